"""Evaluate: every model of the run on held-out text and tasks."""

from __future__ import annotations

import time

from btx.evaluation.evaluate import evaluate_models
from btx.process import Interrupts, Log
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.stages.models_of_run import models_of_run


def evaluate_run(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Measure every model of the run."""
    run.begin(stage)
    started = time.perf_counter()
    evaluate_models(run.path, run.recipe, models_of_run(run), log=log)
    run.finish(stage, tokens=0, flops=0.0, wall_s=time.perf_counter() - started)
