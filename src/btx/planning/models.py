"""What `btx plan` says of every model that will stand in the results: size, and the cost of making and of using it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from btx.baselines.matching import moe_cost
from btx.baselines.settings import routing_of
from btx.choices.baselines import BASELINES, BTM
from btx.models.cost import ModelCost, config_cost, side_by_side
from btx.planning.costs import Costs
from btx.recipe.schema import Recipe
from btx.run_folder.finished_models import model_stages


def model_rows(recipe: Recipe, dense: dict[str, Any], costs: Costs) -> dict[str, Any]:
    """Name → {"total_params", "active_params", "inference_flops_per_token", and the training behind it}.

    Args:
        dense: the seed model's config, completed with its class's defaults.
    """
    rows = {}
    for name, stage in model_stages(recipe).items():
        cost = cost_in_use(recipe, dense, name)
        rows[name] = {
            "total_params": cost.total_params,
            "active_params": cost.active_params,
            "inference_flops_per_token": cost.inference_flops_per_token(recipe.data.sequence_length),
            **asdict(costs.behind(stage)),
        }
    return rows


def cost_in_use(recipe: Recipe, dense: dict[str, Any], name: str) -> ModelCost:
    """Size and FLOPs of a model of the results when it is used, counted as the evaluation counts them."""
    seed = config_cost(dense)
    if name in ("mix", "btx", *recipe.alignments):
        return moe_cost(recipe, dense, recipe.routing)
    if name in BTM:
        return side_by_side([seed] * len(recipe.member_names), BTM[name])
    if name in BASELINES and BASELINES[name].has_routers:
        return moe_cost(recipe, dense, routing_of(recipe, name))
    return seed
