"""The models of a run that are evaluated, and what each cost from the seed model on, predicted and measured."""

from __future__ import annotations

from dataclasses import asdict

from btx.baselines.settings import matched_by
from btx.evaluation.evaluate import ModelEntry
from btx.planning.costs import TrainingCost, dense_config, longest_way, run_costs
from btx.planning.gain import predict_gain
from btx.planning.models import cost_in_use
from btx.planning.speed import measured_speed
from btx.run_folder.finished_models import model_stages
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage


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
    prediction = predict_gain(run, dense, cost_in_use(recipe, dense, "btx"), costs)
    entries["btx"].accounting["predicted_gain"] = prediction and asdict(prediction)
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
