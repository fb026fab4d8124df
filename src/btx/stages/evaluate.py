"""Evaluate: every model of the run on held-out text and tasks."""

from __future__ import annotations

import shutil

from btx.evaluation.evaluate import evaluate_models
from btx.process import Interrupts, Log
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.stages.models_of_run import models_of_run


def evaluate_run(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Measure every model of the run; what was measured of a model before is kept while nothing behind it changed."""
    models = models_of_run(run)
    with run.making(stage, log) as facts:
        kept, before = facts.folder / "models", run.folder(stage.name) / "models"
        if before.is_dir() and not kept.exists():
            shutil.copytree(before, kept)
        evaluate_models(run.path, run.recipe, models, log=log, folder=facts.folder)
