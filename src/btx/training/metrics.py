"""What is written and said of each step: metrics.jsonl, a line an optimiser step, written by the first of several
processes; spikes, dead experts."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from btx.files import write_text, writing
from btx.metrics_file import read_metrics
from btx.models.peak_flops import mfu_fact
from btx.models.sharding import process_count, process_number, same_everywhere
from btx.moe.routing_metrics import DeadExpertWatch
from btx.process import note_progress
from btx.training.job import TrainingJob
from btx.training.spikes import WINDOW, spike_text
from btx.training.step import Facts


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
        if writes:
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
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

    def open(self) -> IO[str]:
        """The file, for appending."""
        return open(self.path, "a", encoding="utf-8")

    def write(
        self, file: IO[str], facts: dict[str, Any], tokens: int, seconds: float, *, at_least_s: float = 0.0
    ) -> None:
        """Append one step's line; `wall_s` adds up over interruptions.

        Args:
            seconds: since the step before was read.
            at_least_s: what the step has taken at the least, part of it perhaps in the seconds of the one before.
        """
        self.wall_s += seconds
        seconds = max(seconds, at_least_s)
        self.last_loss = facts.get("loss", self.last_loss)  # a step that was left out may have none
        line = {**facts, "tokens_per_s": round(tokens / seconds, 1), "wall_s": round(self.wall_s, 3)}
        line |= mfu_fact(tokens, seconds, self.peak_tokens_per_s)
        with writing(self.path):
            file.write(json.dumps(line) + "\n")
            file.flush()


class StepRecord:
    """Takes steps in their order, when they were launched; of each writes a line into `file`, metrics.jsonl, as soon as
    the next one was, or at once. `steps` are those of the whole training."""

    def __init__(
        self, job: TrainingJob, metrics: Metrics, file: IO[str], steps: int, tokens_per_step: int,
        log: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._job, self._metrics, self._file, self._log = job, metrics, file, log
        self._steps, self._tokens_per_step = steps, tokens_per_step
        self._dead = DeadExpertWatch(job.experts, log)
        self._dead.recent.extend(metrics.loads)
        self._waiting: tuple[int, float, Callable[[], Facts], float] | None = None
        self.go_on()

    def go_on(self) -> None:
        """From now on time counts as the next step's."""
        self._since = self._launching_since = time.perf_counter()

    def launched(self, step: int, learning_rate: float, facts: Facts | Callable[[], Facts]) -> None:
        """Step number `step`, counted from 1, was launched, and so the one before can be read.

        Args:
            facts: what it gave; or what reads that, and may raise NotFinite.
        """
        note_progress()
        launch_s = time.perf_counter() - self._launching_since
        self.read()
        if callable(facts):
            self._waiting = step, learning_rate, facts, launch_s
        else:
            self._write(step, learning_rate, facts, launch_s)
        self._launching_since = time.perf_counter()

    def read(self) -> None:
        """Read the step that was launched last, if it was not yet; raises NotFinite."""
        if self._waiting is not None:
            step, learning_rate, read, launch_s = self._waiting
            self._waiting = None
            self._write(step, learning_rate, read(), launch_s)

    def _write(self, step: int, learning_rate: float, facts: Facts, launch_s: float) -> None:
        if (spike := facts.get("spike")) is not None:
            left_out = "; this step is left out, as on_spike: skip says" * spike["skipped"]
            self._log(f"warning: step {step}: {spike_text(facts, spike)}{left_out}")
        if "load" in facts:
            facts["dead"] = self._dead.see(facts["load"])
        tokens, now = step * self._tokens_per_step, time.perf_counter()
        self._metrics.write(self._file, {
            "step": step, "steps": self._steps, "tokens": tokens, **facts, "learning_rate": learning_rate,
            "flops": tokens * self._job.flops_per_token,
            **({"processes": process_count()} if process_count() > 1 else {}),
        }, self._tokens_per_step, now - self._since, at_least_s=launch_s)  # fmt: skip
        self._since = now
