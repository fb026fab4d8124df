"""What a run will cost, before anything runs: tokens, FLOPs, parameters, memory, disk, and the graph of stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from btx.baselines.matching import matched_phases, moe_cost, router_flops
from btx.baselines.settings import matched_by, same_as_the_run
from btx.choices.baselines import BASELINES, stage_names
from btx.choices.families import family_of
from btx.models.cost import ModelCost, config_cost
from btx.models.seed_config import seed_config
from btx.planning.models import model_rows, training_cost
from btx.planning.router_notes import router_notes, saved_as
from btx.planning.speed import Speed
from btx.recipe.mixtures import domain_mixture, finetune_mixture, seed_mixture
from btx.recipe.schema import Recipe
from btx.recipe.training import Training
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Graph
from btx.run_folder.stages_of_recipe import build_graph
from btx.run_folder.threads import threads_of

FLOPS_FORMULA = (
    "training FLOPs = tokens x (4·N + 2·M + 12·L·H·Q·S); N active multiplied parameters, M of them trained: 6·N where "
    "all are (Kaplan et al. 2001.08361), attention as in PaLM (2204.02311, appendix B)"
)


def plan(recipe: Recipe, *, speed: Speed | None = None) -> dict[str, Any]:
    """The cost of every stage and model. Reads configs only; writes and trains nothing.

    Args:
        speed: of one training job (`btx.planning.speed`); None: that of the run's first finished training stage.
            Without either, hours are None.

    Returns:
        {"name", "run", "formula", "router", "speed", "models": {name in the results: {"total_params", "active_params",
        "inference_flops_per_token", "tokens", "flops", "memory_bytes", "hours", "machine_hours"}}, "stages": [...],
        "baselines", "totals"}. A model's training is counted from the seed model on (`training_cost`).
        `router` says how tokens are routed, what the result is saved as, and what a user should know: {"kind",
        "experts_per_token", "saved_as", "notes"}. `baselines`: name → what its training costs from the seed model on,
        and how that is matched (`matching`). The total memory is that of the jobs that train at the same time, or of
        the largest other stage.

    Raises:
        RecipeError: `seed_model.config` has a key that its class does not know.
        CheckpointError: no such seed model, or one that cannot be built or mixed.
    """
    dense = seed_config(recipe)
    family = family_of(dense, "seed model")
    num_experts, layers = len(recipe.expert_names), int(dense["num_hidden_layers"])
    used = recipe.routing.mean_experts_per_token(layers, num_experts)
    run = RunFolder(Path(recipe.run_folder), recipe)
    graph, stages = run.graph, stage_costs(recipe, dense)
    speed = speed or measured_speed(run)
    add_hours(stages, speed, run)
    for stage, row in zip(graph, stages, strict=True):
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
            "notes": [*router_notes(recipe, family), *_baseline_notes(recipe)],
        },
        "speed": speed and {"flops_per_s": speed.flops_per_s, "source": speed.source},
        "models": model_rows(recipe, dense, graph, stages),
        "stages": stages,
        "baselines": {
            name: training_cost(graph, stages, f"baselines/{name}")
            | {"disk_bytes": _disk(graph, stages, name), "matched": matching(recipe, graph, stages, name)}
            for name in recipe.baselines
        },
        "totals": {
            "tokens": sum(row["tokens"] for row in stages),
            "flops": sum(row["flops"] for row in stages),
            "memory_bytes": max(_memory_at_once(recipe, stages), *(row["memory_bytes"] for row in stages)),
            "disk_bytes": sum(row["disk_bytes"] for row in stages),
            "machine_hours": None if speed is None else sum(row["hours"] for row in stages),
        },
    }


def stage_costs(recipe: Recipe, dense: dict[str, Any]) -> list[dict[str, Any]]:
    """What every stage trains, keeps in memory and writes, in the graph's order.

    Args:
        dense: the seed model's config, completed with its class's defaults.
    """
    seed, btx = config_cost(dense), moe_cost(recipe, dense, recipe.routing)
    trained = _trained_stages(recipe, dense, seed)
    written = {"baselines/soup": seed, "baselines/upcycled": btx, "mix": btx}
    rows = []
    for stage in build_graph(recipe):
        weights = written.get(stage.name)
        row: dict[str, Any] = {"stage": stage.name, "tokens": 0, "flops": 0.0, "memory_bytes": 0, "disk_bytes": 0}
        if stage.name in trained:
            row |= trained[stage.name].row(recipe.data.sequence_length)
            weights = trained[stage.name].cost
        if stage.name == "mix":
            row["flops"] = router_flops(recipe, dense)
        if weights is not None:
            row["disk_bytes"] += _number_bytes(recipe, dense, stage.name) * weights.total_params
        rows.append(row)
    return rows


def _number_bytes(recipe: Recipe, dense: dict[str, Any], stage: str) -> int:
    """Bytes of a number in the weights that a stage writes: the seed model's type, or `mix.dtype` from the mix on."""
    mixed = {"mix", "finetune", *(f"baselines/{name}" for name in recipe.baselines if BASELINES[name].start == "mix")}
    own = recipe.mix.dtype if stage in mixed else None
    return 2 if (own or dense.get("dtype") or dense.get("torch_dtype")) in ("bfloat16", "float16") else 4


def add_hours(rows: list[dict[str, Any]], speed: Speed | None, run: RunFolder) -> None:
    """Give every row of `stage_costs` the hours its FLOPs take; None without a speed.

    A stage with half the CPU threads is taken to be half as fast.
    """
    graph = run.graph  # made anew whenever it is asked for
    for row in rows:
        row["hours"] = None
        if speed is not None:
            stage = graph[row["stage"]]
            share = threads_of(run, stage) / speed.threads if speed.threads and stage.trains else 1.0
            row["hours"] = row["flops"] / (share * speed.flops_per_s) / 3600


def measured_speed(run: RunFolder) -> Speed | None:
    """That of the run's first training stage, once it is done; None before."""
    for stage in run.graph:
        done = run.done(stage) if stage.trains else None
        if done and done.get("wall_s"):
            on_gpu = run.recipe.device != "cpu" and torch.cuda.is_available()  # where threads do not matter
            threads = None if on_gpu else done.get("threads")
            return Speed(done["flops"] / done["wall_s"], f"as measured in {stage.name}", threads)
    return None


def matching(recipe: Recipe, graph: Graph, rows: list[dict[str, Any]], name: Any) -> dict[str, Any]:
    """How a baseline's training compares with the run's: {"to": "btx", "by", "flops_ratio"}."""
    flops = training_cost(graph, rows, f"baselines/{name}")["flops"]
    ratio = flops / training_cost(graph, rows, "finetune")["flops"]
    return {"to": "btx", "by": matched_by(recipe, name), "flops_ratio": ratio}


def _disk(graph: Graph, rows: list[dict[str, Any]], name: Any) -> int:
    """Bytes of a baseline's own stages."""
    own = stage_names(name) if BASELINES[name].trains else [f"baselines/{name}"]
    return sum(row["disk_bytes"] for row in rows if row["stage"] in own)


def _memory_at_once(recipe: Recipe, stages: list[dict[str, Any]]) -> int:
    """Memory of the jobs that train at the same time on this machine: the branches, with the baselines that need none
    of them beside; or the finetuning, with all baselines beside it."""
    limit = recipe.launch.jobs or len(recipe.train.domains)
    memory = {row["stage"]: row["memory_bytes"] for row in stages}
    baselines = {name: max(memory[stage] for stage in stage_names(name)) for name in recipe.baselines
                 if BASELINES[name].trains}  # fmt: skip
    first = [memory[f"train/{domain}"] for domain in recipe.train.domains]
    first += [needed for name, needed in baselines.items() if BASELINES[name].two_phases]
    later = [memory["finetune"], *baselines.values()]
    return max(sum(sorted(jobs, reverse=True)[:limit]) for jobs in (first, later))


def _baseline_notes(recipe: Recipe) -> list[str]:
    return [f"baseline {name} is the run itself: the recipe's own settings are those it is about"
            for name in same_as_the_run(recipe)]  # fmt: skip


@dataclass(frozen=True)
class _Trained:
    """A stage that trains."""

    settings: Training
    cost: ModelCost
    """What is computed for a token."""
    mixtures: list[dict[str, float]]
    """Domain → sampling weight; several are read in turn."""

    def row(self, length: int) -> dict[str, Any]:
        """Its part of a row of `stage_costs`."""
        settings, cost = self.settings, self.cost
        steps, tokens_per_step = settings.steps(length), settings.step_tokens(length)
        return {
            "tokens": steps * tokens_per_step,
            "steps": steps,
            "flops": steps * tokens_per_step * cost.training_flops_per_token(length),
            "memory_bytes": cost.training_bytes() + _activation_bytes(cost, settings, length),
            "disk_bytes": 2 * cost.checkpoint_bytes(),  # the last two while it trains; the model comes on top
            "mixture": _shares(self.mixtures),
            "learning_rate": settings.learning_rate,
        }


def _trained_stages(recipe: Recipe, dense: dict[str, Any], seed: ModelCost) -> dict[str, _Trained]:
    """Stage name → what it trains."""
    found = {}
    if recipe.seed_model.train is not None:
        found["seed"] = _Trained(recipe.seed_model.train, seed, [seed_mixture(recipe)])
    branch = config_cost(dense, trainable=recipe.train.trainable)
    for domain in recipe.train.domains:
        found[f"train/{domain}"] = _Trained(recipe.branch_training(domain), branch, [domain_mixture(recipe, domain)])
    # What is computed for a token in finetuning, which is more with a dense router gradient.
    cost = moe_cost(
        recipe, dense, recipe.routing, dense_router_gradient=recipe.finetune.dense_router_gradient,
        trainable=recipe.finetune.trainable,
    )  # fmt: skip
    found["finetune"] = _Trained(recipe.finetune, cost, [finetune_mixture(recipe)])
    for name in recipe.baselines:
        for phase in matched_phases(recipe, name, dense):
            found[phase.stage] = _Trained(phase.settings, phase.cost, phase.mixtures)
    return found


def _shares(mixtures: list[dict[str, float]]) -> dict[str, float]:
    """Domain → its share of all tokens."""
    shares: dict[str, float] = {}
    for mixture in mixtures:
        total = sum(mixture.values()) * len(mixtures)
        for domain, weight in mixture.items():
            shares[domain] = shares.get(domain, 0.0) + weight / total
    return shares


def _activation_bytes(cost: ModelCost, settings: Training, length: int) -> int:
    """A rough upper bound: about 34 numbers a token and unit of width, and layer (Korthikanti et al., arXiv 2205.05198,
    section 4.1, counted in 4-byte numbers), or the layer inputs alone with gradient checkpointing."""
    tokens = max(settings.micro_batch_tokens, length)
    per_unit = 2 if settings.gradient_checkpointing else 34
    return 4 * tokens * cost.attention_width * per_unit
