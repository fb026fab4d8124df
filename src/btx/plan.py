"""What a run will cost, before anything runs: tokens, FLOPs, parameters, memory, disk, and the graph of stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from btx.cost import ModelCost, config_cost
from btx.errors import CheckpointError, RecipeError
from btx.families import family_of
from btx.graph import build_graph
from btx.mixture import domain_mixture, finetune_mixture, seed_mixture
from btx.model_folder import check_model_folder
from btx.recipe import Recipe, Training
from btx.recipe_problems import did_you_mean
from btx.router_notes import router_notes, saved_as
from btx.rundir import RunFolder

FLOPS_FORMULA = (
    "training FLOPs = tokens x (6·N + 12·L·H·Q·S); N active multiplied parameters (Kaplan et al. 2001.08361), "
    "attention as in PaLM (2204.02311, appendix B)"
)


def plan(recipe: Recipe) -> dict[str, Any]:
    """The cost of every stage. Reads configs only; writes and trains nothing.

    Returns:
        {"name", "run", "formula", "router", "models": {"seed", "btx"}, "stages": [...], "totals"}. `router` says how
        tokens are routed, what the result is saved as, and what a user should know: {"kind", "experts_per_token",
        "saved_as", "notes"}. The total memory is that of the branches trained at the same time, or of the largest
        other stage.

    Raises:
        RecipeError: `seed_model.config` has a key that its class does not know.
        CheckpointError: no such seed model, or one that cannot be built or mixed.
    """
    dense = _dense_config(recipe)
    family = family_of(dense, "seed model")
    width = dense["intermediate_size"] // recipe.mix.split
    num_experts, layers = len(recipe.expert_names), int(dense["num_hidden_layers"])
    moe = family.moe_config(
        dense | {"intermediate_size": width}, num_experts, recipe.routing.plain_top_k(num_experts)
    )
    used = recipe.routing.mean_experts_per_token(layers, num_experts)
    costs = {"seed": config_cost(dense), "btx": config_cost(moe, experts_per_token=used)}
    # What is computed for a token in finetuning, which is more with a dense router gradient.
    dense_gradient = recipe.finetune.dense_router_gradient
    costs["finetuning"] = config_cost(
        moe, experts_per_token=num_experts if dense_gradient else used, trainable=recipe.finetune.trainable
    )
    costs["branch"] = config_cost(dense, trainable=recipe.train.trainable)
    stages = [_stage(recipe, stage.name, costs) for stage in build_graph(recipe)]
    run = RunFolder(Path(recipe.run_folder), recipe)
    for stage, row in zip(build_graph(recipe), stages, strict=True):
        row["state"] = run.state(stage)
        row["needs"] = [needed.name for needed in stage.needs]
        if row["state"] == "stale":
            row["why_stale"] = run.why_stale(stage)
    return {
        "name": recipe.name,
        "run": recipe.run_folder,
        "experts": recipe.expert_names,
        "formula": FLOPS_FORMULA,
        "router": {
            "kind": recipe.routing.kind,
            "experts_per_token": used,
            "saved_as": saved_as(recipe, family),
            "notes": router_notes(recipe, family),
        },
        "models": {name: _model(costs[name]) for name in ("seed", "btx")},
        "stages": stages,
        "totals": {
            "tokens": sum(row["tokens"] for row in stages),
            "flops": sum(row["flops"] for row in stages),
            "memory_bytes": max(_memory_at_once(recipe, stages), *(row["memory_bytes"] for row in stages)),
            "disk_bytes": sum(row["disk_bytes"] for row in stages),
        },
    }


def _memory_at_once(recipe: Recipe, stages: list[dict[str, Any]]) -> int:
    """Memory of the branches that train at the same time on this machine."""
    branches = [row["memory_bytes"] for row in stages if row["stage"].startswith("train/")]
    return sum(branches[: recipe.launch.jobs or len(branches)])


def _dense_config(recipe: Recipe) -> dict[str, Any]:
    """Config of the seed model, completed with its class's defaults."""
    from btx.models import read_config

    seed = recipe.seed_model
    if seed.config is not None:
        return _config_from_scratch(seed.config, seed.tokenizer.vocab_size)
    assert seed.path is not None  # the schema guarantees it
    if Path(seed.path).is_dir():
        check_model_folder(Path(seed.path))
    return read_config(seed.path, revision=seed.revision)


# Keys of older configs that transformers still takes, though its config classes no longer have them.
_OLDER_KEYS = {"rope_theta", "rope_scaling", "torch_dtype"}


def _config_from_scratch(config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """`seed_model.config` as transformers completes it; a misspelt key, which transformers would keep, is refused."""
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key != "model_type"}
    try:
        known = AutoConfig.for_model(config["model_type"]).to_dict().keys() | _OLDER_KEYS
        built = AutoConfig.for_model(config["model_type"], **({"vocab_size": vocab_size} | values))
    except Exception as error:  # each config class has checks, and errors, of its own
        raise CheckpointError(f"seed_model.config: transformers cannot build this model: {error}") from error
    for key in values.keys() - known:
        hint = did_you_mean(key, known) or f"; {config['model_type']} has: {', '.join(sorted(known))}"
        raise RecipeError(f"seed_model.config.{key}: unknown key {key!r}{hint}")
    return built.to_dict()


def _model(cost: ModelCost) -> dict[str, int]:
    return {"total_params": cost.total_params, "active_params": cost.active_params}


def _stage(recipe: Recipe, name: str, costs: dict[str, ModelCost]) -> dict[str, Any]:
    """Cost of one stage: what it trains, keeps in memory and writes."""
    settings, cost, mixture = _training(recipe, name, costs)
    weight_bytes = {"seed": costs["seed"], "train": costs["seed"], "baselines": costs["seed"], "mix": costs["btx"],
                    "finetune": costs["btx"]}.get(name.split("/")[0])  # fmt: skip
    row: dict[str, Any] = {
        "stage": name, "tokens": 0, "flops": 0.0, "memory_bytes": 0,
        "disk_bytes": 4 * weight_bytes.total_params if weight_bytes else 0,
    }  # fmt: skip
    if settings is None or cost is None:
        return row
    length = recipe.data.sequence_length
    tokens_per_step = max(1, settings.batch_tokens // length) * length
    steps = math.ceil(settings.tokens / tokens_per_step)
    total = sum(mixture.values())
    row |= {
        "tokens": steps * tokens_per_step,
        "steps": steps,
        "flops": steps * tokens_per_step * cost.training_flops_per_token(length),
        "memory_bytes": cost.training_bytes() + _activation_bytes(cost, settings, length),
        "disk_bytes": 4 * cost.total_params + 2 * cost.checkpoint_bytes(),  # the model and two checkpoints
        "mixture": {domain: weight / total for domain, weight in mixture.items()},
        "learning_rate": settings.learning_rate,
    }
    return row


def _training(
    recipe: Recipe, name: str, costs: dict[str, ModelCost]
) -> tuple[Training | None, ModelCost | None, dict[str, float]]:
    if name == "seed" and recipe.seed_model.train is not None:
        return recipe.seed_model.train, costs["seed"], seed_mixture(recipe)
    if name.startswith("train/"):
        return recipe.train, costs["branch"], domain_mixture(recipe, name.removeprefix("train/"))
    if name == "finetune":
        return recipe.finetune, costs["finetuning"], finetune_mixture(recipe)
    return None, None, {}


def _activation_bytes(cost: ModelCost, settings: Training, length: int) -> int:
    """A rough upper bound: about 34 numbers a token and unit of width, and layer (Korthikanti et al., arXiv 2205.05198,
    section 4.1, counted in 4-byte numbers), or the layer inputs alone with gradient checkpointing."""
    tokens = max(settings.micro_batch_tokens, length)
    per_unit = 2 if settings.gradient_checkpointing else 34
    return 4 * tokens * cost.attention_width * per_unit
