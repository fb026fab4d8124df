"""metrics.jsonl: one line an optimiser step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any


class Metrics:
    """metrics.jsonl: one line a step. After a resume, lines of steps that are done again are dropped first."""

    def __init__(self, path: Path, done: int) -> None:
        self.path = path
        self.wall_s = 0.0
        self.last_loss = math.nan
        self.loads: list[list[list[float]]] = []
        """The experts' load in the steps before, for a MoE model."""
        kept = []
        if path.is_file():
            for line in path.read_text("utf-8").splitlines():
                with_step = _parse(line)
                if with_step is not None and with_step["step"] <= done:
                    kept.append(line)
                    self.wall_s, self.last_loss = with_step["wall_s"], with_step["loss"]
                    self.loads += [with_step["load"]] if "load" in with_step else []
        path.write_text("".join(line + "\n" for line in kept), "utf-8")

    def open(self) -> IO[str]:
        """The file, for appending."""
        return open(self.path, "a", encoding="utf-8")

    def write(self, file: IO[str], facts: dict[str, Any], tokens: int, seconds: float) -> None:
        """Append one step's line; `wall_s` adds up over interruptions."""
        self.wall_s += seconds
        self.last_loss = facts["loss"]
        line = {**facts, "tokens_per_s": round(tokens / seconds, 1), "wall_s": round(self.wall_s, 3)}
        file.write(json.dumps(line) + "\n")
        file.flush()


def _parse(line: str) -> dict[str, Any] | None:
    """A metrics line; None for the stump of a line that a kill cut off."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
