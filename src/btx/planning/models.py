"""What `btx plan` says of every model that will stand in the results: size, and the cost of making and of using it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from btx.baselines.matching import moe_cost
from btx.baselines.settings import routing_of
from btx.choices.baselines import BASELINES, BTM
from btx.models.cost import ModelCost, config_cost, side_by_side
from btx.recipe.schema import Recipe
from btx.run_folder.graph import Graph, Stage


def model_stages(recipe: Recipe) -> dict[str, str]:
    """Name in the results → the stage that makes the model: seed, expert/<domain>, soup, other baselines, mix, btx."""
    baselines = sorted(recipe.baselines, key=lambda name: name != "soup")
    return {
        "seed": "seed",
        **{f"expert/{domain}": f"train/{domain}" for domain in recipe.train.domains},
        **{str(name): f"baselines/{name}" for name in baselines},
        "mix": "mix",
        "btx": "finetune",
    }


def model_rows(recipe: Recipe, dense: dict[str, Any], graph: Graph, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Name → {"total_params", "active_params", "inference_flops_per_token", and what `training_cost` says}.

    Args:
        dense: the seed model's config, completed with its class's defaults.
        rows: `stage_costs`, with hours where they can be told.
    """
    found = {}
    for name, stage in model_stages(recipe).items():
        cost = cost_in_use(recipe, dense, name)
        found[name] = {
            "total_params": cost.total_params,
            "active_params": cost.active_params,
            "inference_flops_per_token": cost.inference_flops_per_token(recipe.data.sequence_length),
            **training_cost(graph, rows, stage),
        }
    return found


def training_cost(graph: Graph, rows: list[dict[str, Any]], stage: str) -> dict[str, Any]:
    """All training behind a stage's model from the seed model on; of the seed model, its own.

    Args:
        rows: `stage_costs`.

    Returns:
        {"tokens", "flops", "memory_bytes" (the largest), "hours" (of the longest way to the model), "machine_hours" (of
        all jobs)}; hours are None where no speed is known.
    """
    by_name = {row["stage"]: row for row in rows}
    behind = [by_name[needed.name] for needed in graph[stage].training_behind()]
    timed = all(row.get("hours") is not None for row in rows)
    return {
        "tokens": sum(row["tokens"] for row in behind),
        "flops": sum(row["flops"] for row in behind),
        "memory_bytes": max((row["memory_bytes"] for row in behind), default=0),
        "hours": longest_way(graph[stage], lambda needed: by_name[needed.name]["hours"]) if timed else None,
        "machine_hours": sum(row["hours"] for row in behind if graph[row["stage"]].trains) if timed else None,
    }


def longest_way(stage: Stage, length: Callable[[Stage], float]) -> float:
    """Training one after the other on the longest way from the seed model to this stage: what passes where every job
    has a machine of its own.

    Args:
        length: of a stage that trains, in the unit that is returned.
    """
    before = max((longest_way(needed, length) for needed in stage.needs if needed.name != "seed"), default=0.0)
    return before + (length(stage) if stage.trains else 0.0)


def cost_in_use(recipe: Recipe, dense: dict[str, Any], name: str) -> ModelCost:
    """Size and FLOPs of a model of the results when it is used, counted as the evaluation counts them."""
    seed = config_cost(dense)
    if name in ("mix", "btx"):
        return moe_cost(recipe, dense, recipe.routing)
    if name in BTM:
        return side_by_side([seed] * len(recipe.member_names), BTM[name])
    if name in BASELINES and BASELINES[name].has_routers:
        return moe_cost(recipe, dense, routing_of(recipe, name))
    return seed
