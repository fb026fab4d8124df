"""Analyze: which expert each token of the run's model uses."""

from __future__ import annotations

from btx.evaluation.analyze import analyze
from btx.process import Interrupts, Log
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage


def analyze_run(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Route held-out text through the finetuned model."""
    with run.making(stage, log) as facts:
        analyze(run.path, run.recipe, run.model("finetune"), log=log, folder=facts.folder)
