"""How many tokens a baseline trains, so that it costs what the BTX run costs (docs/baselines.md).

    BTX      C = N · t_b · c_branch + R + t_f · c_moe   N branches of t_b tokens, finetuning of t_f, c FLOPs a token;
                                                        R: routers computed from text
    DM       t_1 = N · t_b, t_2 = t_f                   the same sequences, once each
    CM       s · (t_1 + t_2) · c = C                    both phases longer by one factor s, in whole steps

The last phase takes up the first one's rounding, so the FLOPs differ from C by half of its optimiser step at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from btx.baselines.settings import matched_by, phases_of, routing_of
from btx.choices.baselines import BASELINES
from btx.choices.families import family_of
from btx.choices.routers import RoutingRule
from btx.models.cost import ModelCost, config_cost
from btx.recipe.schema import Recipe
from btx.recipe.training import Finetune


@dataclass(frozen=True)
class MatchedPhase:
    """One training stage of a baseline as it is trained."""

    stage: str
    settings: Finetune
    """Tokens are whole optimiser steps."""
    mixtures: list[dict[str, float]]
    """Mixtures that samples are taken from in turn: domain → sampling weight."""
    cost: ModelCost
    """What is computed for a token in training."""


def moe_config(recipe: Recipe, dense: dict[str, Any]) -> dict[str, Any]:
    """Config of the mixed model.

    Args:
        dense: the seed model's config, completed with its class's defaults.
    """
    num_experts = len(recipe.expert_names)
    width = dense["intermediate_size"] // recipe.mix.split
    family = family_of(dense, "seed model")
    return family.moe_config(dense | {"intermediate_size": width}, num_experts, recipe.routing.plain_top_k(num_experts))


def moe_cost(
    recipe: Recipe, dense: dict[str, Any], routing: RoutingRule, *, dense_router_gradient: bool = False,
    trainable: str = "all", lora_rank: int = 0,
) -> ModelCost:  # fmt: skip
    """Cost of the mixed model with a router.

    Args:
        dense_router_gradient: count every expert for every token, as then in training.
        trainable: what trains, as in `finetune.trainable`, or lora.
        lora_rank: of the adapters, where that is lora.
    """
    num_experts = len(recipe.expert_names)
    used = routing.mean_experts_per_token(int(dense["num_hidden_layers"]), num_experts)
    run = num_experts if dense_router_gradient else used
    return config_cost(moe_config(recipe, dense), experts_per_token=run, trainable=trainable, lora_rank=lora_rank)


def finetuning_cost(recipe: Recipe, dense: dict[str, Any], routing: RoutingRule, settings: Finetune) -> ModelCost:
    """Cost of the mixed model as it is trained: more is computed for a token with a dense router gradient."""
    return moe_cost(
        recipe, dense, routing, dense_router_gradient=settings.dense_router_gradient, trainable=settings.trainable
    )


def router_flops(recipe: Recipe, dense: dict[str, Any]) -> float:
    """FLOPs of computing the mix's routers from text: forward passes without the LM head of `mix.router_tokens` tokens
    of every mixed model's domain, through all experts. 0 where routers need no text."""
    num_experts = len(recipe.expert_names)
    if not recipe.router_init.needs_text:
        return 0.0
    everything = config_cost(moe_config(recipe, dense), experts_per_token=num_experts)
    head = 2.0 * dense["vocab_size"] * dense["hidden_size"]
    per_token = everything.inference_flops_per_token(recipe.data.sequence_length) - head
    return len(recipe.member_names) * recipe.mix.router_tokens * per_token


def run_flops(recipe: Recipe, dense: dict[str, Any]) -> float:
    """Training FLOPs of the run after its seed model: all branches, the routers and the finetuning."""
    length, train, finetune = recipe.data.sequence_length, recipe.train, recipe.finetune
    branches = len(train.domains) * train.trained_tokens(length)
    finetuning = finetuning_cost(recipe, dense, recipe.routing, finetune)
    branch = config_cost(dense, trainable=train.trainable, lora_rank=train.lora.rank)
    return (
        branches * branch.training_flops_per_token(length)
        + router_flops(recipe, dense)
        + finetune.trained_tokens(length) * finetuning.training_flops_per_token(length)
    )


def matched_phases(recipe: Recipe, name: str, dense: dict[str, Any]) -> list[MatchedPhase]:
    """The training stages of a baseline with their final tokens; empty if it is not trained.

    Args:
        dense: the seed model's config, completed with its class's defaults.
    """
    phases, length = phases_of(recipe, name), recipe.data.sequence_length
    if not phases:
        return []
    has_routers, routing = BASELINES[name].has_routers, routing_of(recipe, name)
    costs = [finetuning_cost(recipe, dense, routing, phase.settings) if has_routers else config_cost(dense)
             for phase in phases]  # fmt: skip
    step_tokens = [phase.settings.step_tokens(length) for phase in phases]
    step_flops = [
        tokens * cost.training_flops_per_token(length) for tokens, cost in zip(step_tokens, costs, strict=True)
    ]
    steps = [phase.settings.steps(length) for phase in phases]
    by = matched_by(recipe, name)
    if by == "flops":
        steps = scaled_steps(steps, step_flops, run_flops(recipe, dense))
    elif by == "recipe":
        steps = scaled_steps(steps, step_tokens, recipe.baseline_training[name].tokens or 0)
    return [
        MatchedPhase(
            phase.stage, phase.settings.model_copy(update={"tokens": steps[i] * step_tokens[i]}),
            phase.mixtures(recipe), costs[i],
        )
        for i, phase in enumerate(phases)
    ]  # fmt: skip


def scaled_steps(steps: Sequence[int], per_step: Sequence[float], budget: float) -> list[int]:
    """Steps of each phase, all scaled by one factor, so that together they cost `budget`.

    Args:
        per_step: what a step of each phase costs, in the budget's unit.

    Returns:
        Whole steps, at least one a phase. The last phase takes up the rounding of those before it.
    """
    factor = budget / sum(count * cost for count, cost in zip(steps, per_step, strict=True))
    first = [max(1, round(factor * count)) for count in steps[:-1]]
    left = budget - sum(count * cost for count, cost in zip(first, per_step[:-1], strict=True))
    return [*first, max(1, round(left / per_step[-1]))]
