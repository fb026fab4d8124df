"""What `btx plan` says about a recipe's router: what a plain class cannot express, and what a setting does or costs."""

from __future__ import annotations

import math

from btx.choices.families import Family
from btx.recipe.schema import Recipe


def saved_as(recipe: Recipe, family: Family) -> str:
    """The class the mixed model is saved as; `btx` where no plain class routes like it."""
    return "btx" if recipe.routing.why_not_plain(family.probability_gates) else family.moe


def router_notes(recipe: Recipe, family: Family) -> list[str]:
    """What a user should know about the recipe's router before anything runs."""
    notes, router, moe_class = [], recipe.routing, family.moe
    k = router.plain_top_k(len(recipe.expert_names))
    if why := router.why_not_plain(family.probability_gates):
        notes.append(
            f"router {router.kind}: no plain {moe_class} routes like this ({why}). The model is saved in a folder that "
            f"only btx reads; transformers, vLLM and llama.cpp refuse it"
        )
    elif router.kind == "switch":
        notes.append(
            f"router switch: saved as a plain {moe_class} with k = 1 and norm_topk_prob: false; transformers honours "
            f"that, llama.cpp's Qwen3-MoE does not"
        )
    elif router.kind != "top_k":
        notes.append(f"router {router.kind}: saved as a plain {moe_class} with k = {k}")
    return notes + _in_training(recipe)


def _in_training(recipe: Recipe) -> list[str]:
    """What the router does in finetuning alone."""
    notes, router, settings = [], recipe.routing, recipe.finetune
    if router.kind == "switch":
        notes.append(
            f"router switch: an expert takes at most {router.capacity_factor:g} times an equal share of a "
            f"micro-batch's tokens in training, more are dropped (metrics.jsonl: dropped); at inference none is"
        )
    if router.kind == "sample_top1":
        steps = settings.steps(recipe.data.sequence_length)
        last = max(router.temperature_floor, math.exp(-router.temperature_rate * (steps - 1)))
        notes.append(
            f"router sample_top1: the temperature goes from 1 to {last:.2f} over the finetuning's {steps:,} steps; "
            f"at inference the likeliest expert is taken, with gate 1"
        )
    dense = settings.dense_router_gradient
    if router.kind == "top_k" and router.top_k == 1 and not dense:
        notes.append(
            "mix.top_k 1: the gate is 1 whatever the router says, so the next-token loss does not train the router "
            "(load balancing does); switch, sample_top1 and finetune.dense_router_gradient do"
        )
    if settings.load_balancing_bias:
        notes.append(
            "finetune.load_balancing_bias: the biases choose experts in finetuning alone, no plain class has them; at "
            "inference tokens take their likeliest experts, and loads are less even than metrics.jsonl says"
        )
    if dense:
        num_experts = len(recipe.expert_names)
        notes.append(
            f"finetune.dense_router_gradient: all {num_experts} experts run on every token in finetuning, "
            f"{num_experts / router.top_k:g} times the feed-forward FLOPs of k = {router.top_k}; counted below"
        )
    return notes
