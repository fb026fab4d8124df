"""metrics.jsonl: one line an optimiser step, written by the first of several processes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import IO, Any

from btx.files import writing
from btx.metrics_file import read_metrics
from btx.models.peak_flops import mfu_fact
from btx.models.sharding import process_number, same_everywhere
from btx.training.spikes import WINDOW


class Metrics:
    """metrics.jsonl: one line a step. After a resume, lines of steps that are done again are dropped first. All of
    several processes know what it holds.

    Args:
        peak_tokens_per_s: of all devices, of which `mfu` is a share; None: lines have none.
    """

    def __init__(self, path: Path, done: int, peak_tokens_per_s: float | None = None) -> None:
        writes = process_number() == 0
        lines = read_metrics(path, skip_broken=True) if writes else []
        kept = same_everywhere([line for line in lines if line["step"] <= done])
        self.path = path if writes else Path(os.devnull)
        self.peak_tokens_per_s = peak_tokens_per_s
        self.wall_s = 0.0
        self.last_loss = math.nan
        self.loads: list[list[list[float]]] = []
        """The experts' load in the steps before, for a MoE model."""
        numbered = [index for index, line in enumerate(kept) if "loss" in line]
        self.recent = kept[numbered[-WINDOW] :] if len(numbered) > WINDOW else kept
        """The last steps before, for the watch on spikes: as many with a loss as it looks back on."""
        for line in kept:
            self.wall_s, self.last_loss = line.get("wall_s", self.wall_s), line.get("loss", self.last_loss)
            self.loads += [line["load"]] if "load" in line else []
        with writing(self.path):
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")

    def open(self) -> IO[str]:
        """The file, for appending."""
        return open(self.path, "a", encoding="utf-8")

    def write(self, file: IO[str], facts: dict[str, Any], tokens: int, seconds: float) -> None:
        """Append one step's line; `wall_s` adds up over interruptions."""
        self.wall_s += seconds
        self.last_loss = facts.get("loss", self.last_loss)  # a step that was left out may have none
        line = {**facts, "tokens_per_s": round(tokens / seconds, 1), "wall_s": round(self.wall_s, 3)}
        line |= mfu_fact(tokens, seconds, self.peak_tokens_per_s)
        with writing(self.path):
            file.write(json.dumps(line) + "\n")
            file.flush()
