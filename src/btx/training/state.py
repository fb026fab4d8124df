"""Resumable checkpoints of a training run: state/step-N/, safetensors and JSON only, each checked by SHA-256.

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
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from btx.errors import RunFolderError
from btx.files import atomic_folder, file_sha256, read_json, remove_left_overs, write_sealed
from btx.outputs import CheckpointState
from btx.process import Log
from btx.training.background_writer import BackgroundWriter
from btx.training.host_memory import HostCopy, fits_in_host_memory
from btx.training.optimizer import kept_tensors, restore_tensors
from btx.training.tensor_file import TensorFile

KEPT = 2  # the last checkpoint, and the one before it in case a file of the last was damaged
STATE, METRICS = "state.json", "metrics.jsonl"
WEIGHTS, MOMENTS = "weights.safetensors", "optimizer.safetensors"
LONG_WAIT_S = 1.0
"""Seconds that training waits for the checkpoint before without a word."""


class StateFolder:
    """A stage's checkpoints in its folder state/; one of `btx.training.checkpoints.Checkpoints`.

    Args:
        folder: the state/ folder.
        marks: what a resume must find unchanged, for example the data's fingerprint: name → value.
        device: where the job runs. On another one it may go on, but not bit for bit as it would have.
        log: told so.
        check_inputs: called before a state is kept; raises if what the training reads is not as it was when it began.
    """

    def __init__(
        self, folder: Path, marks: Mapping[str, str], *, device: str = "cpu", log: Log = lambda line: None,
        check_inputs: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.marks = dict(marks)
        self.device, self.log = device, log
        self._check_inputs = check_inputs
        self._writer = BackgroundWriter()
        self._copies: dict[str, HostCopy] | None = None
        """File → memory for what will be in it; None until it is known to fit, empty if it does not."""
        self._waited = False

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore the newest whole checkpoint; a damaged one is passed over, which is logged. 0 if there is none.

        Raises:
            RunFolderError: it has other marks, or there are checkpoints and none is whole.
        """
        passed_over: list[str] = []
        for checkpoint in reversed(self._all()):
            try:
                state = _whole_state(checkpoint)
            except RunFolderError as error:
                passed_over.append(str(error))
                self.log(f"a damaged checkpoint is passed over: {error}")
                continue
            if state["marks"] != self.marks:
                differing = [key for key in self.marks if state["marks"].get(key) != self.marks[key]]
                raise RunFolderError(
                    f"{checkpoint}: made with other {', '.join(differing)}; resuming would mix old and new. "
                    f"Restore them, or remove {self.folder.parent} to train anew"
                )
            if (before := state.get("device", self.device)) != self.device:
                self.log(f"resumed on {self.device} what was trained on {before}: from here on the result is not bit "
                         f"for bit that of one device")  # fmt: skip
            self._compare_metrics(state.get("metrics"))
            _restore(checkpoint, model, optimizer)
            return int(state["step"])
        if passed_over:
            raise RunFolderError(
                f"{self.folder}: no checkpoint is whole: {'; '.join(passed_over)}. Restore one from a copy, or remove "
                f"{self.folder.parent} to train anew"
            )
        return 0

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the state after `step` finished optimiser steps and let a thread write it as a checkpoint, then remove
        all but the last two. Waits while the checkpoint before is still being written, and writes before it returns
        where memory has no room for the copy; both are said once.

        Raises:
            RunFolderError: the checkpoint before could not be written, or an input has changed; what is whole is
                untouched.
        """
        self._wait_for_the_one_before()
        self._check_inputs()
        weights, moments = kept_tensors(model, optimizer)
        files = {WEIGHTS: weights, MOMENTS: moments}
        if self._copies is None:
            self._copies = self._room_for(files)
        contents = {file: TensorFile.of(tensors, self._copies.get(file)) for file, tensors in files.items()}
        metrics = self.folder.parent / METRICS
        metrics_bytes = metrics.stat().st_size if metrics.exists() else 0
        self._writer.start(partial(self._write, step, contents, metrics_bytes))
        if not self._copies:
            self._writer.wait()

    def check(self) -> None:
        """Raise what the writing of the last checkpoint has failed with by now."""
        self._writer.check()

    def close(self) -> None:
        """Wait until the last checkpoint is written, and give the copy's memory back; raises RunFolderError if it could
        not be written."""
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
        if fits_in_host_memory(size):
            return {file: HostCopy() for file in files}
        self.log(f"memory has no room for a copy of what a checkpoint holds ({size / 1e9:.1f} GB): training stands "
                 f"still while one is written")  # fmt: skip
        return {}

    def _write(self, step: int, contents: Mapping[str, TensorFile], metrics_bytes: int) -> None:
        """Write a checkpoint and remove all but the last two; its files are hashed as they are written."""
        with atomic_folder(self.folder / _name(step)) as target:
            sha256 = {file: content.write(target / file) for file, content in contents.items()}
            write_sealed(target / STATE, {
                "step": step, "marks": self.marks, "device": self.device, "sha256": sha256,
                "metrics": self._metrics(metrics_bytes),
            })  # fmt: skip
        self._remove_all_but(KEPT)

    def last(self) -> str:
        """Path of the newest checkpoint, once it is written; raises as `close`."""
        self._writer.wait()
        found = self._all()
        return str(found[-1]) if found else "none yet"

    def keep_only_last(self) -> None:
        """Remove all checkpoints but the newest, once it is written; raises as `close`."""
        self.close()
        self._remove_all_but(1)

    def _metrics(self, size: int | None = None) -> dict[str, Any]:
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

    def _remove_all_but(self, newest: int) -> None:
        for old in self._all()[:-newest]:
            shutil.rmtree(old)
        remove_left_overs(self.folder, r"step-\d+")


def _whole_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files are all as they were written; raises RunFolderError if one is not."""
    path = checkpoint / STATE
    state: dict[str, Any] | None = read_json(path, CheckpointState)
    if state is None:
        raise RunFolderError(f"{path}: there is no such file")
    if checkpoint.name != _name(state["step"]):
        raise RunFolderError(f"{path}: it is of step {state['step']}")
    for name, sha256 in state["sha256"].items():
        if not (checkpoint / name).is_file():
            raise RunFolderError(f"{checkpoint / name}: there is no such file")
        if file_sha256(checkpoint / name) != sha256:
            raise RunFolderError(f"{checkpoint / name}: its bytes are others than those that were written")
    return state


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, moments = (load_file(checkpoint / name) for name in (WEIGHTS, MOMENTS))
    try:
        restore_tensors(model, optimizer, weights, moments)
    except RunFolderError as error:
        raise RunFolderError(f"{checkpoint}: {error}") from error
