"""Evaluate: every model of the run on held-out text and tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from btx.evaluation.evaluate import evaluate_models
from btx.files import write_text
from btx.process import Interrupts, Log
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.stages.models_of_run import models_of_run
from btx.training.trackers.follow import FOLDER, followed
from btx.training.trackers.tracker import Tracked


def evaluate_run(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Measure every model of the run; what was measured of a model before is kept while nothing behind it changed."""
    models = models_of_run(run)
    with run.making(stage, log) as facts:
        kept, before = facts.folder / "models", run.folder(stage.name) / "models"
        if before.is_dir() and not kept.exists():
            shutil.copytree(before, kept)
        results = evaluate_models(run.path, run.recipe, models, log=log, folder=facts.folder)
        if run.recipe.track:
            _track(run, stage, results, facts.folder / FOLDER, log)


def _track(run: RunFolder, stage: Stage, results: dict[str, Any], folder: Path, log: Log) -> None:
    """Tell trackers the bits per byte of every model, as the one step of a training."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    bits = {
        name: {domain: measured["bits_per_byte"] for domain, measured in model["domains"].items()}
        | {"mean": model["mean_bits_per_byte"]}
        for name, model in results["models"].items()
    }  # fmt: skip
    line = {"step": 1, "bits_per_byte": bits}
    write_text(folder / "results.jsonl", json.dumps(line) + "\n")
    tracked = Tracked(run.recipe.name, run.path, stage.name, folder, stage.shown)
    with followed(run.recipe.track, tracked, folder / "results.jsonl", (), log):
        pass  # all there is to follow is there
