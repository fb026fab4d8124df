"""metrics.jsonl as others read it: one JSON object an optimiser step, appended while a stage trains. Plain Python.

Whoever reads it may come while a line is written, or after a kill that cut one off: the stump at the end is left out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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
