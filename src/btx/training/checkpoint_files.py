"""The files of a checkpoint: what each process has written of it, whole when all of them are there. Plain Python.

state/step-N/ of a training in one process is its only part: weights.safetensors, optimizer.safetensors and state.json.
Of W processes each writes the same three files into state/step-N/part-R-of-W/ (`btx.training.checkpoint_parts`).

Parts with another number of processes, or another `together`, a word that the processes of one start share, were left
by trainings that died: they are no part of a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from btx.errors import RunFolderError
from btx.files import file_sha256, read_json
from btx.outputs import CheckpointState

STATE = "state.json"
WEIGHTS, MOMENTS = "weights.safetensors", "optimizer.safetensors"
PART = re.compile(r"part-(\d+)-of-(\d+)")


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


def check_parts(
    checkpoint: Path, count: int, read: slice = slice(None), *, name: str | None = None
) -> list[dict[str, Any]]:
    """state.json of all parts, whose files are as they were written.

    Args:
        read: which of the files are looked at, where several processes ask together.
        name: what the checkpoint will be called, where it does not lie in its place yet.

    Raises:
        RunFolderError: names the file that is not.
    """
    states, files = [], []
    for number in range(count):
        folder = part_folder(checkpoint, number, count)
        state: dict[str, Any] | None = read_json(folder / STATE, CheckpointState)
        if state is None:
            raise RunFolderError(f"{folder / STATE}: there is no such file")
        if (name or checkpoint.name) != step_name(state["step"]):
            raise RunFolderError(f"{folder / STATE}: it is of step {state['step']}")
        states.append(state)
        files += [(file, folder, sha256) for file, sha256 in state["sha256"].items()]
    files.sort(key=lambda file: file[0] != MOMENTS)  # large ones first, so that all get as much of them
    for file, folder, sha256 in files[read]:
        if not (folder / file).is_file():
            raise RunFolderError(f"{folder / file}: there is no such file")
        if file_sha256(folder / file) != sha256:
            raise RunFolderError(f"{folder / file}: its bytes are others than those that were written")
    return states
