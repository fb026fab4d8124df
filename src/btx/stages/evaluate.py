"""Evaluate: every model of the run on held-out text and tasks, beside what each cost from the seed model on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from btx.baselines.settings import matched_by
from btx.errors import UserError
from btx.evaluation.evaluate import ModelEntry, OtherEntry, evaluate_models
from btx.files import atomic_folder, write_text
from btx.outputs import read_output
from btx.planning.costs import TrainingCost, dense_config, longest_way, run_costs
from btx.planning.kept_prediction import prediction_of
from btx.planning.speed import measured_speed
from btx.process import Interrupts, Log
from btx.reporting.report import write_report
from btx.reporting.run_files import MEASURING
from btx.run_folder.finished_models import model_stages
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.graph import Stage
from btx.run_folder.other_models import add_other_models, check_other_models, forget_other_models, read_other_models
from btx.stages.work import run_stages
from btx.training.trackers.follow import FOLDER, followed
from btx.training.trackers.tracker import Tracked

PATIENCE_S = 60.0
"""How long an evaluation, or a report, that is just ending is waited for."""


def evaluate_run(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Measure every model of the run, and those beside it; what was measured of a model before is kept while nothing
    behind it changed."""
    with run.making(stage, log) as facts:
        results = _measure(run, facts.folder, ["models"], log)
        if run.recipe.track:
            _track(run, stage, results, facts.folder / FOLDER, log)


def evaluate_beside(
    run: RunFolder, models: Mapping[str, str | Path], forget: Sequence[str], interrupts: Interrupts, log: Log
) -> None:
    """Add models to those beside a run's, or take some away, and measure what is new; what cannot be measured is not
    kept there.

    Raises:
        UserError: a name or folder that cannot be, or a model that could not be measured.
    """
    check_other_models(run.recipe, models)
    forget_other_models(run.path, list(forget))
    add_other_models(run.path, models)
    if run.state(run.graph["evaluate"]) != "done":
        run_stages(run, ["evaluate"], interrupts, log)
    else:
        evaluate_others(run, interrupts, log)
    measured = read_output(run.path / "evaluate" / "results.json")["models"]
    if (run.path / "report" / "index.html").is_file():
        with exclusive(run.path, "report", patience_s=PATIENCE_S):
            write_report(run.path, stale=run.stale(*MEASURING))
    if missing := [name for name in models if name not in measured]:
        forget_other_models(run.path, missing)
        raise UserError(f"{', '.join(missing)}: could not be measured and is not in the results; the lines above say "
                        f"why")  # fmt: skip


def evaluate_others(run: RunFolder, interrupts: Interrupts, log: Log) -> None:
    """Measure the models beside the run's (`btx.run_folder.other_models`), and write the results with them anew. What
    is finished of the run's own stays finished: no stage is stale for it."""
    stage = run.graph["evaluate"]
    with exclusive(run.path, stage.name, patience_s=PATIENCE_S), interrupts.at_once(), run.making(stage, log) as facts:
        _measure(run, facts.folder, ["models", FOLDER], log)


def _measure(run: RunFolder, folder: Path, kept: Sequence[str], log: Log) -> dict[str, Any]:
    """results.json of the run, in a new folder; `kept` are folders that are taken over from before."""
    for name in kept:
        if (before := run.folder("evaluate") / name).is_dir() and not (folder / name).exists():
            with atomic_folder(folder / name) as beside:
                shutil.copytree(before, beside, dirs_exist_ok=True)
    ours = models_of_run(run)
    models: dict[str, ModelEntry | OtherEntry] = {**ours, **_others(run, set(ours), log)}
    return evaluate_models(run.path, run.recipe, models, log=log, folder=folder)


def _others(run: RunFolder, ours: set[str], log: Log) -> dict[str, OtherEntry]:
    """The models beside the run's, but for those whose name the run has given to one of its own since."""
    entries: dict[str, OtherEntry] = {}
    for name, model in read_other_models(run.path).items():
        if name in ours:
            log(f"{name}: the run has a model of this name now; {model['path']} is left out")
        else:
            path = Path(model["path"]) if Path(model["path"]).is_absolute() else model["path"]
            entries[name] = OtherEntry(path, model["inputs"])
    return entries


def _track(run: RunFolder, stage: Stage, results: dict[str, Any], folder: Path, log: Log) -> None:
    """Tell trackers the bits per byte of every model, as the one step of a training."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    bits = {
        name: {domain: measured["bits_per_byte"] for domain, measured in model["domains"].items()}
        | {"mean": model["mean_bits_per_byte"]}
        for name, model in results["models"].items() if "other" not in model
    }  # fmt: skip
    line = {"step": 1, "bits_per_byte": bits}
    write_text(folder / "results.jsonl", json.dumps(line) + "\n")
    tracked = Tracked(run.recipe.name, run.path, stage.name, folder, stage.shown)
    with followed(run.recipe.track, tracked, folder / "results.jsonl", (), log):
        pass  # all there is to follow is there


def models_of_run(run: RunFolder) -> dict[str, ModelEntry]:
    """seed, expert/<domain>, soup, the other baselines, mix and btx.

    Tokens, FLOPs and hours add up all training a model needed. The seed model's own training is counted in `seed` only:
    what is compared is what came after it.
    """
    graph, recipe = run.graph, run.recipe
    dense = dense_config(run)
    costs = run_costs(run, dense, measured_speed(run))  # as `btx plan` has them, at the speed of the seed
    predicted = {stage.name: costs.behind(stage.name) for stage in costs.graph}
    entries = {name: _entry(run, graph[stage], predicted[stage]) for name, stage in model_stages(recipe).items()}
    entries["btx"].accounting["predicted_gain"] = prediction_of(run)
    for name in recipe.baselines:
        entries[name].accounting["matched"] = {"to": "btx", "by": matched_by(recipe, name)} | _ratios(
            entries[name], entries["btx"]
        )
    return entries


def _entry(run: RunFolder, stage: Stage, predicted: TrainingCost) -> ModelEntry:
    done = [run.done(behind) or {} for behind in stage.training_behind()]
    trained = [run.done(behind) or {} for behind in stage.training_behind() if behind.trains]
    peaks = [facts["peak_memory_bytes"] for facts in done if "peak_memory_bytes" in facts]
    return ModelEntry(
        path=run.model(stage.name),
        tokens=sum(int(facts.get("tokens", 0)) for facts in done),
        flops=sum(float(facts.get("flops", 0.0)) for facts in done),
        hours=longest_way(stage, lambda needed: _wall_s(run, needed)) / 3600,
        inputs=stage.inputs,
        accounting={
            "machine_hours": sum(facts.get("machines", 1) * facts.get("wall_s", 0.0) for facts in trained) / 3600,
            "peak_memory_bytes": max(peaks, default=None),
            "predicted": asdict(predicted),
            **({"mfu": done[-1]["mfu"]} if done and "mfu" in done[-1] else {}),
        },
    )


def _wall_s(run: RunFolder, stage: Stage) -> float:
    return float((run.done(stage) or {}).get("wall_s", 0.0))


def _ratios(entry: ModelEntry, btx: ModelEntry) -> dict[str, float | None]:
    """Training FLOPs and machine-hours as multiples of the run's; None where the run took none that were measured."""
    hours, ours = btx.accounting["machine_hours"], entry.accounting["machine_hours"]
    return {
        "flops_ratio": entry.flops / btx.flops if btx.flops else None,
        "hours_ratio": ours / hours if hours else None,
    }
