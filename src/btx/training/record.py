"""What is written and said of each step: metrics.jsonl, spikes, dead experts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import IO

from btx.models.sharding import process_count
from btx.moe.routing_metrics import DeadExpertWatch
from btx.process import note_progress
from btx.training.job import TrainingJob
from btx.training.metrics import Metrics
from btx.training.spikes import spike_text
from btx.training.step import Facts


class StepRecord:
    """Takes steps in their order, when they were launched; of each writes a line as soon as the next one was, or at
    once.

    Args:
        file: metrics.jsonl, open.
        steps: of the whole training.
        log: called with a line for the user.
    """

    def __init__(
        self, job: TrainingJob, metrics: Metrics, file: IO[str], steps: int, tokens_per_step: int,
        log: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._job, self._metrics, self._file, self._log = job, metrics, file, log
        self._steps, self._tokens_per_step = steps, tokens_per_step
        self._dead = DeadExpertWatch(job.experts, log)
        self._dead.recent.extend(metrics.loads)
        self._waiting: tuple[int, float, Callable[[], Facts]] | None = None
        self.go_on()

    def go_on(self) -> None:
        """From now on time counts as the next step's."""
        self._since = time.perf_counter()

    def launched(self, step: int, learning_rate: float, facts: Facts | Callable[[], Facts]) -> None:
        """Step number `step`, counted from 1, was launched, and so the one before can be read.

        Args:
            facts: what it gave; or what reads that, and may raise NotFinite.
        """
        note_progress()
        self.read()
        if callable(facts):
            self._waiting = step, learning_rate, facts
        else:
            self._write(step, learning_rate, facts)

    def read(self) -> None:
        """Read the step that was launched last, if it was not yet; raises NotFinite."""
        if self._waiting is not None:
            step, learning_rate, read = self._waiting
            self._waiting = None
            self._write(step, learning_rate, read())

    def _write(self, step: int, learning_rate: float, facts: Facts) -> None:
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
        }, self._tokens_per_step, now - self._since)  # fmt: skip
        self._since = now
