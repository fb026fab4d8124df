"""What a run will cost, before anything runs: tokens, FLOPs, parameters, memory, disk, and the graph of stages."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from btx.baselines.settings import matched_by, same_as_the_run
from btx.choices.baselines import BASELINES, stage_names
from btx.choices.families import family_of
from btx.models.device import precision_notes
from btx.planning.aligned import aligned_notes
from btx.planning.costs import Costs, dense_config, run_costs
from btx.planning.disk import bytes_to_write
from btx.planning.gain import gain_notes, predict_gain
from btx.planning.gpu_memory import gpu_here, memory_rows
from btx.planning.measuring import measuring_rows
from btx.planning.models import cost_in_use, model_rows
from btx.planning.router_notes import router_notes, saved_as
from btx.planning.speed import Speed, measured_speed
from btx.recipe.derived import training_notes
from btx.recipe.schema import Recipe
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.run_folder.threads import jobs_at_once, jobs_side_by_side
from btx.system_errors import free_bytes

FLOPS_FORMULA = (
    "training FLOPs = tokens x (4·N + 2·M + 12·L·H·Q·S); N active multiplied parameters, M of them trained: 6·N where "
    "all are (Kaplan et al. 2001.08361), attention as in PaLM (2204.02311, appendix B)"
)


def plan(recipe: Recipe, *, speed: Speed | None = None, gpu_memory: int | None = None) -> dict[str, Any]:
    """The cost of every stage and model. Reads configs only; writes and trains nothing.

    Args:
        speed: of one training job (`btx.planning.speed`); None: that of the run's first finished training stage.
            Without either, hours are None.
        gpu_memory: bytes of a GPU that every training shall fit into; None: those of this machine's GPU, if it has one
            and the recipe may use it.

    Returns:
        {"name", "run", "formula", "notes", "prediction": `Prediction`, or None where nobody says how many tokens an
        existing seed model has read, "router", "speed", "models": {name in the results: {"total_params",
        "active_params", "inference_flops_per_token", "tokens", "flops", "memory_bytes", "hours", "machine_hours"}},
        "stages": [...], "gpu": None or {"memory_bytes", "stages": rows of `btx.planning.gpu_memory`, "measuring":
        rows of `btx.planning.measuring`}, "stays": stages
        that are done, "to_do": stages that a run would make, "baselines", "totals"}.
        A model's training is counted from the seed model on (`TrainingCost`).
        `router` says how tokens are routed, what the result is saved as, and what a user should know: {"kind",
        "experts_per_token", "saved_as", "notes"}. `baselines`: name → what its training costs from the seed model on,
        and how that is matched (`matching`). The total memory is that of the jobs that train at the same time, or of
        the largest other stage.

    Raises:
        RecipeError: `seed_model.config` has a key that its class does not know.
        CheckpointError: no such seed model, or one that cannot be built or mixed.
    """
    run = RunFolder(Path(recipe.run_folder), recipe)
    dense = dense_config(run)
    family_of(dense, "seed model")  # refuses a class that cannot be mixed, before anything is counted
    speed = speed or measured_speed(run)
    costs = run_costs(run, dense, speed)
    stages = [cost.as_json() | _state(run, cost.stage) for cost in costs]
    gpu_memory = gpu_memory or gpu_here(recipe)
    prediction = predict_gain(run, dense, cost_in_use(recipe, dense, "btx"), costs)
    return {
        "name": recipe.name,
        "run": recipe.run_folder,
        "experts": recipe.expert_names,
        "formula": FLOPS_FORMULA,
        "notes": [
            *training_notes(recipe),
            *precision_notes(recipe),
            *aligned_notes(recipe),
            *gain_notes(prediction),
        ],
        "prediction": prediction and asdict(prediction),
        "router": _router(recipe, dense),
        "speed": speed and {"flops_per_s": speed.flops_per_s, "source": speed.source},
        "models": model_rows(recipe, dense, costs),
        "stages": stages,
        "gpu": gpu_memory and _gpu(recipe, dense, gpu_memory),
        "stays": [row["stage"] for row in stages if row["state"] == "done"],
        "to_do": [stage.name for stage in costs.graph if run.is_to_make(stage)],
        "baselines": {
            name: asdict(costs.behind(f"baselines/{name}"))
            | {"disk_bytes": _disk(costs, name), "matched": matching(recipe, costs, name)}
            for name in recipe.baselines
        },
        "totals": _totals(run, costs) | {"machine_hours": speed and sum(cost.machine_hours for cost in costs)},
    }


def _gpu(recipe: Recipe, dense: dict[str, Any], memory: int) -> dict[str, Any]:
    """Whether every training and measuring fits into so many bytes."""
    return {
        "memory_bytes": memory,
        "stages": memory_rows(recipe, dense, memory),
        "measuring": measuring_rows(recipe, dense, memory),
    }


def _router(recipe: Recipe, dense: dict[str, Any]) -> dict[str, Any]:
    """How tokens are routed, and what the result is saved as."""
    family, layers = family_of(dense, "seed model"), int(dense["num_hidden_layers"])
    return {
        "kind": recipe.routing.kind,
        "experts_per_token": recipe.routing.mean_experts_per_token(layers, len(recipe.expert_names)),
        "saved_as": saved_as(recipe, family),
        "notes": [*router_notes(recipe, family), *_baseline_notes(recipe)],
    }


def _totals(run: RunFolder, costs: Costs) -> dict[str, Any]:
    """All stages together, but for the hours."""
    return {
        "tokens": sum(cost.tokens for cost in costs),
        "flops": sum(cost.flops for cost in costs),
        "memory_bytes": max(_memory_at_once(costs), *(cost.memory_bytes for cost in costs)),
        "disk_bytes": sum(cost.disk_bytes for cost in costs),
        "to_write_bytes": bytes_to_write(run, costs),
        "free_bytes": free_bytes(run.path),
    }


def _state(run: RunFolder, stage: Stage) -> dict[str, Any]:
    """Where a stage of the run folder stands."""
    state = run.state(stage)
    row: dict[str, Any] = {"state": state, "needs": [needed.name for needed in stage.needs]}
    return row | ({"why_stale": run.why_stale(stage)} if state == "stale" else {})


def matching(recipe: Recipe, costs: Costs, name: str) -> dict[str, Any]:
    """How a baseline's training compares with the run's: {"to": "btx", "by", "flops_ratio"}."""
    ratio = costs.behind(f"baselines/{name}").flops / costs.behind("finetune").flops
    return {"to": "btx", "by": matched_by(recipe, name), "flops_ratio": ratio}


def _disk(costs: Costs, name: str) -> int:
    """Bytes of a baseline's own stages."""
    stages = stage_names(name) if BASELINES[name].trains else [f"baselines/{name}"]
    return sum(costs[stage].disk_bytes for stage in stages)


def _memory_at_once(costs: Costs) -> int:
    """Memory of the jobs that train at the same time on a machine, where the largest come together, each with all its
    processes there. On a cluster a job is taken to have its machines alone."""
    launch = costs.graph.recipe.launch
    limit = jobs_at_once(costs.graph) if launch.kind == "local" else 1

    def memory(stage: str) -> int:
        return costs[stage].memory_bytes * costs[stage].processes // launch.nodes_of(stage)

    together = [
        sorted((max(memory(stage.name) for stage in job) for job in jobs), reverse=True)
        for jobs in jobs_side_by_side(costs.graph)
    ]
    return max(sum(memory[:limit]) for memory in together)


def _baseline_notes(recipe: Recipe) -> list[str]:
    return [f"baseline {name} is the run itself: the recipe's own settings are those it is about"
            for name in same_as_the_run(recipe)]  # fmt: skip
