"""The parts of a checkpoint: what each process has written of it, whole when all of them are there.

state/step-N/ of a training in one process is its only part: weights.safetensors, optimizer.safetensors and state.json.
Of W processes each writes the same three files into state/step-N/part-R-of-W/: its rows (dimension 0) of every sharded
tensor; the first process also writes what is not sharded. `rows` in state.json says which they are. Nothing but the
file system joins parts, so a process waits for no other while it writes, and any number of processes reads them.

Parts with another number of processes, or another `together`, a word that the processes of one start share, were left
by trainings that died: they are no part of a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from btx.errors import RunFolderError
from btx.files import file_sha256, read_json
from btx.models.sharding import first_row, local_rows, process_count, process_number
from btx.outputs import CheckpointState

STATE = "state.json"
WEIGHTS, MOMENTS = "weights.safetensors", "optimizer.safetensors"
PART = re.compile(r"part-(\d+)-of-(\d+)")

Rows = dict[str, list[int]]
"""Name of a sharded tensor → number of the first row that is here, then the shape of the whole."""


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def part_folder(checkpoint: Path, number: int, count: int) -> Path:
    """Where process `number` of `count` writes its part."""
    return checkpoint if count == 1 else checkpoint / f"part-{number:05d}-of-{count:05d}"


def complete_in(checkpoint: Path) -> list[int]:
    """The numbers of processes whose parts are all there; several where a damaged checkpoint was written again by
    another number of them, none where a writer died."""
    folders: dict[int, list[Path]] = {}
    for folder in sorted(checkpoint.glob("part-*-of-*")):
        if matched := PART.fullmatch(folder.name):
            folders.setdefault(int(matched[2]), []).append(folder)
    counts = [count for count, parts in sorted(folders.items()) if len(parts) == count and _together(parts)]
    return [1] * any((checkpoint / name).exists() for name in (STATE, WEIGHTS, MOMENTS)) + counts


def _together(parts: Sequence[Path]) -> bool:
    """Whether one start of a training has written them; a state.json that cannot be read says so when it is loaded."""
    words = set()
    for folder in parts:
        with suppress(RunFolderError):
            if (state := read_json(folder / STATE)) is not None:
                words.add(state.get("together"))
    return len(words) <= 1


def check_parts(checkpoint: Path, count: int) -> list[dict[str, Any]]:
    """state.json of all parts. Of their files, which are as they were written, this process reads every n-th, where n
    processes ask together.

    Raises:
        RunFolderError: names the file that is not.
    """
    states, files = [], []
    for number in range(count):
        folder = part_folder(checkpoint, number, count)
        state: dict[str, Any] | None = read_json(folder / STATE, CheckpointState)
        if state is None:
            raise RunFolderError(f"{folder / STATE}: there is no such file")
        if checkpoint.name != step_name(state["step"]):
            raise RunFolderError(f"{folder / STATE}: it is of step {state['step']}")
        states.append(state)
        files += [(name, folder, sha256) for name, sha256 in state["sha256"].items()]
    files.sort(key=lambda file: file[0] != MOMENTS)  # large ones first, so that all get as much of them
    for name, folder, sha256 in files[process_number() :: process_count()]:
        if not (folder / name).is_file():
            raise RunFolderError(f"{folder / name}: there is no such file")
        if file_sha256(folder / name) != sha256:
            raise RunFolderError(f"{folder / name}: its bytes are others than those that were written")
    return states


class PartOfProcess(NamedTuple):
    """What one process writes of some tensors; not copied."""

    tensors: dict[str, Tensor]
    rows: Rows


def part_of_this_process(tensors: Mapping[str, Tensor]) -> PartOfProcess:
    """The rows of sharded tensors that this process holds; the first process also takes what is not sharded."""
    kept = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor) or process_number() == 0}
    rows = {name: [first_row(tensor), *tensor.shape] for name, tensor in kept.items() if isinstance(tensor, DTensor)}
    return PartOfProcess({name: local_rows(tensor) for name, tensor in kept.items()}, rows)


class JoinedFiles(Mapping[str, Tensor]):
    """One file of all parts, read tensor by tensor when asked for one: of a sharded tensor the rows of this process.

    Args:
        parts: file and its `rows`, in order.
        like: name → the weight that a tensor is restored into, or is a moment of.
    """

    def __init__(self, parts: Sequence[tuple[Path, Rows]], like: Mapping[str, Tensor]) -> None:
        self._files = [(safe_open(path, "pt"), rows) for path, rows in parts]
        self._holders: dict[str, list[tuple[Any, Rows]]] = {}
        for file, rows in self._files:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                self._holders.setdefault(name, []).append((file, rows))
        self._like = like

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)

    def __getitem__(self, name: str) -> Tensor:
        holders, like = self._holders[name], self._like.get(name.rpartition("/")[2])
        file, _ = holders[0]
        if like is None or not file.get_slice(name).get_shape():
            whole: Tensor = file.get_tensor(name)
            return whole
        start = first_row(like)
        stop = start + len(local_rows(like))
        pieces = []
        for file, rows in holders:
            part, first = file.get_slice(name), rows[name][0] if name in rows else 0
            low, high = max(start - first, 0), min(stop - first, part.get_shape()[0])
            if low < high:
                pieces.append(part[low:high])
        return torch.cat(pieces) if pieces else torch.empty(0, *like.shape[1:])
