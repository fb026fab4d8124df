"""metrics.jsonl as others read it: one JSON object an optimiser step, appended while a stage trains. Plain Python.

Whoever reads it may come while a line is written, or after a kill that cut one off: the stump at the end is left out.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from btx.errors import RunFolderError
from btx.number_texts import is_number

NUMBERS = {"steps", "tokens", "loss", "tokens_per_s", "wall_s"}
"""Keys whose values others count with."""
LAST_BYTES = 16_384
"""Bytes looked at first for the last line; a MoE model's loads may need more."""


def read_metrics(path: Path, *, skip_broken: bool = False) -> list[dict[str, Any]]:
    """One object a step, ascending, empty without a file; of two lines for one step the later counts.

    Args:
        skip_broken: leave out broken lines before the last too; else they are refused.

    Raises:
        RunFolderError: a line other than the last is no JSON object with a step.
    """
    if not path.exists():
        return []
    steps: dict[int, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")
    for number, text in enumerate(lines, start=1):
        if not text:
            continue
        try:
            line = _parsed(text)
        except ValueError as error:
            if number == len(lines) or skip_broken:
                continue
            raise RunFolderError(
                f"{path}:{number}: not a JSON object with a step ({error}); mend or remove the line"
            ) from error
        steps[line["step"]] = line
    return [steps[step] for step in sorted(steps)]


def last_metrics(path: Path) -> dict[str, Any] | None:
    """The last whole line, without reading all of them; None without one."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            looked_at = 0
            while looked_at < size:
                looked_at = min(size, 2 * looked_at or LAST_BYTES)
                file.seek(size - looked_at)
                for text in reversed(file.read(looked_at).split(b"\n")[:-1]):
                    try:
                        return _parsed(text)
                    except ValueError:
                        continue
    except FileNotFoundError:
        pass
    return None


MOST_BYTES = 1 << 25
"""Bytes from the end of a file at which a tail begins to read."""
MARK_BYTES = 64
"""Bytes by which a tail sees that the file is still the one it has read."""


@dataclass(frozen=True)
class Step:
    """What is kept of a line while a training is watched."""

    number: int
    loss: float | None
    spike: bool
    """Whether it stood out from those before (`btx.training.spikes`)."""
    skipped: bool
    """Whether its update was left out for that."""


class MetricsTail:
    """metrics.jsonl of a stage that is watched: each look reads only what has come since the last one.

    A training that was resumed writes the file anew, without the steps it does again: then all is read again. Of a file
    over `MOST_BYTES` the end alone is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: list[Step] = []
        """Ascending."""
        self.last: dict[str, Any] | None = None
        """The last line."""
        self._offset = 0
        self._mark = b""

    def look(self) -> None:
        """Read what is new; a file that is not there, or not any more, has no steps."""
        try:
            with open(self.path, "rb") as file:
                text = self._new(file)
        except (FileNotFoundError, NotADirectoryError):
            self._begin_at(0)
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._mark = (self._mark + whole)[-MARK_BYTES:]
        for line in whole.split(b"\n"):
            try:
                self._take(_parsed(line))
            except ValueError:  # cut off by a kill, or by where reading began
                continue

    def _new(self, file: BinaryIO) -> bytes:
        """Everything after what was read, or from the start if that is not there any more."""
        size = os.fstat(file.fileno()).st_size
        file.seek(self._offset - len(self._mark))
        if size < self._offset or file.read(len(self._mark)) != self._mark:
            self._begin_at(0)
        if size - self._offset > MOST_BYTES:
            self._begin_at(size - MOST_BYTES)
        file.seek(self._offset)
        return file.read()

    def _begin_at(self, offset: int) -> None:
        self.steps, self.last, self._offset, self._mark = [], None, offset, b""

    def _take(self, line: dict[str, Any]) -> None:
        while self.steps and self.steps[-1].number >= line["step"]:
            self.steps.pop()  # of two lines for one step the later counts
        spike = line.get("spike")
        skipped = isinstance(spike, dict) and bool(spike.get("skipped"))
        self.steps.append(Step(line["step"], line.get("loss"), spike is not None, skipped))
        self.last = line


def _parsed(text: bytes) -> dict[str, Any]:
    """A line; raises ValueError where it is none."""
    value = json.loads(text)
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        raise ValueError("it has no step")
    if wrong := [key for key in NUMBERS & value.keys() if not is_number(value[key])]:
        raise ValueError(f"{', '.join(sorted(wrong))}: no number")
    load = value.get("load", [])
    if not isinstance(load, list) or not all(isinstance(layer, list) and all(map(is_number, layer)) for layer in load):
        raise ValueError("load: no shares by layer and expert")
    return value
