"""Analyze: which expert each token of the run's model uses."""

from __future__ import annotations

import time

from btx.evaluation.analyze import analyze
from btx.process import Interrupts, Log
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage


def analyze_run(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Route held-out text through the finetuned model."""
    run.begin(stage)
    started = time.perf_counter()
    analyze(run.path, run.recipe, run.model("finetune"), log=log)
    run.finish(stage, tokens=0, flops=0.0, wall_s=time.perf_counter() - started)
