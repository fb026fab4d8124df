"""Analyze: which expert each token of the run's model uses."""

from __future__ import annotations

from btx.evaluation.analyze import analyze
from btx.evaluation.routing_shift import write_routing_shift
from btx.process import Interrupts, Log
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage


def analyze_run(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Route held-out text through the finetuned model, and through what was made of it."""
    with run.making(stage, log) as facts:
        analyze(run.path, run.recipe, run.model("finetune"), log=log, folder=facts.folder)
        if aligned := {stage.name.removeprefix("align/"): run.model(stage.name) for stage in run.graph.aligned}:
            write_routing_shift(facts.folder, run.path, run.recipe, run.model("finetune"), aligned, log)
