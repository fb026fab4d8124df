"""Resumable checkpoints of a training run: state/step-N/, safetensors and JSON only, each checked by SHA-256. How they
are laid out is in `btx.training.checkpoint_files`, how several processes share one in `btx.training.checkpoint_parts`.

A checkpoint holds the trainable weights (and selection biases of routers), AdamW's moments and the step. The step
decides everything else: the data position is step · samples per step (`btx.data.mixture`), the learning rate is a
function of the step, and the random state is drawn anew from (rng_seed, step) before each step. So a resumed run is
bit-identical to an uninterrupted one.

Training stands still only while a checkpoint is copied within memory; a thread writes and hashes the copy.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from btx.errors import RunFolderError
from btx.files import atomic_folder, remove_left_overs, write_sealed
from btx.models.sharding import from_all, process_count, process_number, same_everywhere
from btx.process import Log, processes_here
from btx.training.background_saving import BackgroundWriter, HostCopy, file_of, fits_in_host_memory
from btx.training.checkpoint_files import (
    MOMENTS,
    PART,
    STATE,
    WEIGHTS,
    check_parts,
    complete_in,
    part_folder,
    step_name,
)
from btx.training.checkpoint_parts import JoinedFiles, part_of_this_process
from btx.training.checkpoints import Checkpoints
from btx.training.optimizer import kept_tensors, kept_weights, restore_tensors

KEPT = 2  # the last checkpoint, and the one before it in case a file of the last was damaged
METRICS = "metrics.jsonl"
LONG_WAIT_S = 1.0
"""Seconds that training waits for the checkpoint before without a word."""


class StateFolder(Checkpoints):
    """A stage's checkpoints in its folder state/.

    Each of several processes has one and writes its own part of a checkpoint, without waiting for the others'. They
    call `load` together, and `save` after the same steps. The first process alone removes checkpoints.

    Args:
        folder: the state/ folder.
        marks: what a resume must find unchanged, for example the data's fingerprint: name → value.
        device: where the job runs. On another one it may go on, but not bit for bit as it would have.
        log: told so.
        trunk: hash of the trunk that the training begins with (`btx.run_folder.trunk`), and the steps that are on it;
            None: none. A checkpoint on it may be another training's.
        check_inputs: called before a state is kept; raises if what the training reads is not as it was when it began.
    """

    def __init__(
        self, folder: Path, marks: Mapping[str, str], *, device: str = "cpu", log: Log = lambda line: None,
        trunk: tuple[str, int] | None = None, check_inputs: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.marks = dict(marks)
        self.device, self.log = device, log
        self.trunk = trunk
        self._check_inputs = check_inputs
        self._writer = BackgroundWriter()
        self._copies: dict[str, HostCopy] | None = None
        """File → memory for what will be in it; None until it is known to fit, empty if it does not."""
        self._passed_over: set[str] = set()
        """Names of checkpoints that were found damaged; the training writes them again when it gets there."""
        self._waited = False
        self._together = ""
        """A word that the processes of this start share, and no other start's."""

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore the newest whole checkpoint; a damaged one is passed over, which is logged. 0 if there is none.

        Raises:
            RunFolderError: it has other marks, or there are checkpoints and none is whole.
        """
        problems: list[str] = []
        from_the_first = (self._complete(), uuid.uuid4().hex) if process_number() == 0 else None
        complete, self._together = same_everywhere(from_the_first)
        for name, count in complete:
            states, problem = self._checked(name, count)
            if problem is None:
                self._passed_over.discard(name)  # of its parts others may be damaged (`complete_in`)
                return self._restore(self.folder / name, states, model, optimizer)
            problems.append(problem)
            self._passed_over.add(name)
            self.log(f"a damaged checkpoint is passed over: {problem}")
        if problems:
            raise RunFolderError(
                f"{self.folder}: no checkpoint is whole: {'; '.join(problems)}. Restore one from a copy, or remove "
                f"{self.folder.parent} to train anew"
            )
        return 0

    def _complete(self) -> list[tuple[str, int]]:
        """Checkpoints of which no part is missing, and their numbers of parts, newest first. What a training has left
        that died while it wrote others is removed, unless it is still writing."""
        complete = {checkpoint: complete_in(checkpoint) for checkpoint in reversed(self._all())}
        for checkpoint in [checkpoint for checkpoint, counts in complete.items() if not counts]:
            remove_left_overs(checkpoint, PART.pattern)
            if not list(checkpoint.glob(".*")):
                self.log(f"{checkpoint}: not every process has written its part before the training died: it does not "
                         f"count and is removed")  # fmt: skip
                shutil.rmtree(checkpoint, ignore_errors=True)
        return [(checkpoint.name, count) for checkpoint, counts in complete.items() for count in counts]

    def _checked(self, name: str, count: int) -> tuple[list[dict[str, Any]], str | None]:
        """state.json of a checkpoint's parts, and what is wrong with one, on whichever process that was found."""
        states, problem = [], None
        try:
            states = check_parts(self.folder / name, count, slice(process_number(), None, process_count()))
        except RunFolderError as error:
            problem = str(error)
        return states, next((problem for problem in from_all(problem) if problem is not None), None)

    def _restore(
        self, checkpoint: Path, states: list[dict[str, Any]], model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> int:  # fmt: skip
        """Restore a whole checkpoint; returns its step."""
        state = states[0]
        if state["marks"] != self.marks and not self._is_on_trunk(state):
            differing = [key for key in self.marks if state["marks"].get(key) != self.marks[key]]
            raise RunFolderError(
                f"{checkpoint}: made with other {', '.join(differing)}; resuming would mix old and new. "
                f"Restore them, or remove {self.folder.parent} to train anew"
            )
        if (before := state.get("device", self.device)) != self.device:
            self.log(f"resumed on {self.device} what was trained on {before}: from here on the result is not bit "
                     f"for bit that of one device")  # fmt: skip
        self._compare_metrics(state.get("metrics"))
        like = kept_weights(model)
        folders = [part_folder(checkpoint, number, len(states)) for number in range(len(states))]
        rows = [state.get("rows", {}) for state in states]
        weights, moments = (
            JoinedFiles([(folder / file, rows_there) for folder, rows_there in zip(folders, rows, strict=True)], like)
            for file in (WEIGHTS, MOMENTS)
        )  # fmt: skip
        try:
            restore_tensors(model, optimizer, weights, moments)
        except RunFolderError as error:
            raise RunFolderError(f"{checkpoint}: {error}") from error
        return int(state["step"])

    def _is_on_trunk(self, state: Mapping[str, Any]) -> bool:
        """Whether another training's checkpoint is one that this training would have made too."""
        if self.trunk is None or state.get("trunk") != self.trunk[0] or state["step"] > self.trunk[1]:
            return False
        return all(state["marks"].get(key) == mark for key, mark in self.marks.items() if key != "inputs")

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the state after `step` finished optimiser steps and let a thread write it as a checkpoint, then remove
        all but two: the last, and the one before it or the last on the trunk, from which others go on. Waits while the
        checkpoint before is still being written, and writes before it returns where memory has no room for the copy;
        both are said once.

        Raises:
            RunFolderError: the checkpoint before could not be written, or an input has changed; what is whole is
                untouched.
        """
        self._wait_for_the_one_before()
        self._check_inputs()
        weights, moments = map(part_of_this_process, kept_tensors(model, optimizer))
        files = {WEIGHTS: weights.tensors, MOMENTS: moments.tensors}
        if self._copies is None:
            self._copies = self._room_for(files)
        contents = {file: file_of(tensors, self._copies.get(file)) for file, tensors in files.items()}
        metrics = self.folder.parent / METRICS
        metrics_bytes = metrics.stat().st_size if metrics.exists() else 0
        number, count = process_number(), process_count()
        part = part_folder(self.folder / step_name(step), number, count)
        facts: dict[str, Any] = {"together": self._together, "rows": weights.rows | moments.rows} if count > 1 else {}
        if self.trunk is not None and step <= self.trunk[1]:
            facts["trunk"] = self.trunk[0]
        self._writer.start(partial(self._write, step, part, contents, None if number else metrics_bytes, facts))
        if not self._copies:
            self._writer.wait()

    def check(self) -> None:
        self._writer.check()

    def close(self) -> None:
        """As `Checkpoints.close`; gives the copy's memory back."""
        self._copies = None
        self._writer.wait()

    def _wait_for_the_one_before(self) -> None:
        started = time.monotonic()
        self._writer.wait()
        if (seconds := time.monotonic() - started) > LONG_WAIT_S and not self._waited:
            self._waited = True
            self.log(f"training waited {seconds:.0f} s for the checkpoint before to be written; a larger "
                     f"checkpoint_every or a faster disk spares that")  # fmt: skip

    def _room_for(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, HostCopy]:
        """Memory for a copy of each file's tensors; empty if it does not fit, which is said."""
        size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        if fits_in_host_memory(size * processes_here()):
            return {file: HostCopy() for file in files}
        self.log(f"memory has no room for a copy of what a checkpoint holds ({size / 1e9:.1f} GB): training stands "
                 f"still while one is written")  # fmt: skip
        return {}

    def _write(
        self, step: int, part: Path, contents: Mapping[str, Callable[[Path], str]], metrics_bytes: int | None,
        facts: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Write this process's part; its files are hashed as they are written. The first process, which alone has
        metrics, then removes all but the last two checkpoints."""
        with atomic_folder(part) as target:
            sha256 = {file: write(target / file) for file, write in contents.items()}
            metrics = {"metrics": self._metrics(metrics_bytes)} if metrics_bytes is not None else {}
            write_sealed(target / STATE, {
                "step": step, "marks": self.marks, "device": self.device, "sha256": sha256, **metrics, **facts
            })  # fmt: skip
        self._passed_over.discard(step_name(step))
        if metrics_bytes is not None:
            self._remove_all_but(KEPT)

    def last(self) -> str:
        """Path of the newest checkpoint that is complete, once this process's part is written; raises as `close`."""
        self._writer.wait()
        complete = self._usable()
        return str(complete[-1]) if complete else "none yet"

    def keep_only_last(self) -> None:
        """Remove all checkpoints but one, once this process's part is written: the last on the trunk, where that is of
        use to others, or the newest; raises as `close`."""
        self.close()
        if process_number() == 0:
            self._remove_all_but(1)

    def _metrics(self, size: int) -> dict[str, Any]:
        """What metrics.jsonl holds, up to `size` bytes: seconds and loss of a resumed training go on from there."""
        path = self.folder.parent / METRICS
        written = path.read_bytes()[:size] if path.exists() else b""
        return {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}

    def _compare_metrics(self, kept: dict[str, Any] | None) -> None:
        """They decide no weight, and a disk that failed may have lost lines: that they changed is only told."""
        if kept is not None and self._metrics(kept["bytes"]) != kept:
            self.log(f"{self.folder.parent / METRICS}: not as it was at the checkpoint: the weights are right, but "
                     f"loss and seconds of the steps before may not be")  # fmt: skip

    def _all(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-*"))

    def _usable(self) -> list[Path]:
        """Those of which all parts are there, and that were not found damaged; oldest first."""
        return [path for path in self._all() if path.name not in self._passed_over and complete_in(path)]

    def _remove_all_but(self, count: int) -> None:
        """Remove all but the `count` newest complete checkpoints, of which the oldest gives way to the last on the
        trunk; others may still be writing younger ones."""
        complete = self._usable()
        kept, steps = complete[-count:], self.trunk[1] if self.trunk is not None else 0
        for last_on_trunk in [checkpoint for checkpoint in complete if checkpoint.name <= step_name(steps)][-1:]:
            kept = kept if last_on_trunk in kept else [last_on_trunk, *kept[1:]]
        for old in [checkpoint for checkpoint in self._all() if complete and checkpoint <= complete[-1]]:
            if old not in kept:
                shutil.rmtree(old)
        remove_left_overs(self.folder, r"step-\d+")
