"""What every stage of a run costs, and the training behind every model: tokens, FLOPs, memory, disk, hours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from btx.baselines.matching import finetuning_cost, matched_phases, moe_cost, router_flops
from btx.choices.baselines import BASELINES
from btx.models.configs import read_config
from btx.models.cost import ModelCost, config_cost
from btx.models.device import choose_device
from btx.models.seed_config import seed_config
from btx.planning.aligned import aligned_settings
from btx.planning.speed import Speed
from btx.recipe.mixtures import domain_mixture, finetune_mixture, seed_mixture
from btx.recipe.schema import Recipe
from btx.recipe.training import Finetune, Training
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Graph, Stage
from btx.run_folder.threads import threads_of
from btx.training.memory import MemoryNeeds, may_freeze


def dense_config(run: RunFolder) -> dict[str, Any]:
    """Config of a run's seed model, completed with its class's defaults; of an existing model from the run folder once
    it is there, so that nothing depends on where it came from.

    Raises:
        RecipeError: `seed_model.config` has a key that its class does not know.
        CheckpointError: no such model, or one that transformers cannot build.
    """
    if run.recipe.seed_model.path is not None and run.recorded("seed"):
        return read_config(run.model("seed"))
    return seed_config(run.recipe)


@dataclass(frozen=True)
class StageCost:
    """What one stage trains, keeps in memory and writes."""

    stage: Stage
    tokens: int
    flops: float
    memory_bytes: int
    disk_bytes: int
    """The model, and the last two checkpoints while it trains."""
    checkpoint_bytes: int
    """Of one of them; the last one stays."""
    hours: float | None
    """None where no speed is known."""
    trained: Mapping[str, Any]
    """How it trains: its steps, mixture (domain → its share of all tokens) and learning_rate; empty if it does not."""
    processes: int = 1
    """That train the model together; the memory is that of each."""
    machines: int = 1
    """They are spread over."""

    @property
    def machine_hours(self) -> float:
        """Hours of all its machines; 0 where no speed is known."""
        return (self.hours or 0.0) * self.machines

    def as_json(self) -> dict[str, Any]:
        """Its row of `btx plan --json`."""
        return {
            "stage": self.stage.name, "tokens": self.tokens, "flops": self.flops, "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes, **self.trained, "hours": self.hours,
            "processes": self.processes,
        }  # fmt: skip


@dataclass(frozen=True)
class TrainingCost:
    """All training behind a model from the seed model on; of the seed model, its own. `btx plan --json` has all
    fields."""

    tokens: int
    flops: float
    memory_bytes: int
    """The largest."""
    hours: float | None
    """Of the longest way to the model; None where no speed is known."""
    machine_hours: float | None
    """Of all jobs; None where no speed is known."""


@dataclass(frozen=True)
class Costs:
    """The costs of all stages of a run."""

    graph: Graph
    by_stage: Mapping[str, StageCost]
    """In the graph's order."""

    def __getitem__(self, stage: str) -> StageCost:
        return self.by_stage[stage]

    def __iter__(self) -> Iterator[StageCost]:
        return iter(self.by_stage.values())

    def behind(self, name: str) -> TrainingCost:
        """The training behind the model that a stage makes."""
        stage = self.graph[name]
        behind = [self[needed.name] for needed in stage.training_behind()]
        timed = all(cost.hours is not None for cost in self)
        return TrainingCost(
            tokens=sum(cost.tokens for cost in behind),
            flops=sum(cost.flops for cost in behind),
            memory_bytes=max((cost.memory_bytes for cost in behind), default=0),
            hours=longest_way(stage, lambda needed: self[needed.name].hours or 0.0) if timed else None,
            machine_hours=sum(cost.machine_hours for cost in behind if cost.stage.trains) if timed else None,
        )


def longest_way(stage: Stage, length: Callable[[Stage], float]) -> float:
    """Training one after the other on the longest way from the seed model to this stage: what passes where every job
    has a machine of its own.

    Args:
        length: of a stage that trains, in the unit that is returned.
    """
    before = max((longest_way(needed, length) for needed in stage.needs if needed.name != "seed"), default=0.0)
    return before + (length(stage) if stage.trains else 0.0)


def run_costs(run: RunFolder, dense: dict[str, Any], speed: Speed | None) -> Costs:
    """What every stage trains, keeps in memory and writes.

    Args:
        dense: the seed model's config, completed with its class's defaults.
        speed: of one device (`devices_of`); a stage with half the CPU threads is taken to be half as fast, one of
            several devices to be so many times as fast. None: no hours.
    """
    recipe, graph = run.recipe, run.graph
    seed, btx = config_cost(dense), moe_cost(recipe, dense, recipe.routing)
    trainings = stage_trainings(recipe, dense)
    written = {"baselines/soup": seed, "baselines/upcycled": btx, "mix": btx}
    costs = {}
    for stage in graph:
        training = trainings.get(stage.name)
        weights = training.cost if training else written.get(stage.name)
        flops = training.flops if training else router_flops(recipe, dense) if stage.name == "mix" else 0.0
        disk = _number_bytes(recipe, dense, stage.name) * weights.total_params if weights else 0
        costs[stage.name] = StageCost(
            stage,
            tokens=training.tokens if training else 0,
            flops=flops,
            memory_bytes=training.memory_bytes if training else 0,
            disk_bytes=disk + (2 * training.memory.checkpoint_bytes if training else 0),
            checkpoint_bytes=training.memory.checkpoint_bytes if training else 0,
            hours=None if speed is None else _hours(graph, stage, flops, speed),
            trained=training.trained if training else {},
            processes=recipe.launch.processes_of(stage.name) if training else 1,
            machines=recipe.launch.nodes_of(stage.name) if training else 1,
        )
    return Costs(graph, costs)


def _hours(graph: Graph, stage: Stage, flops: float, speed: Speed) -> float:
    share = threads_of(graph, stage) / speed.threads if speed.threads and stage.trains else 1.0
    return flops / (share * devices_of(graph.recipe, stage.name) * speed.flops_per_s) / 3600


def devices_of(recipe: Recipe, stage: str) -> int:
    """Devices that a stage trains on: a GPU a process, or the processors of its machines, which processes share."""
    on_gpus = planned_device(recipe) == "cuda"
    return recipe.launch.processes_of(stage) if on_gpus else recipe.launch.nodes_of(stage)


def _number_bytes(recipe: Recipe, dense: dict[str, Any], stage: str) -> int:
    """Bytes of a number in the weights that a stage writes: the seed model's type, or `mix.dtype` from the mix on."""
    mixed = {"mix", "finetune", *(f"baselines/{name}" for name in recipe.baselines if BASELINES[name].start == "mix")}
    dtype = recipe.mix.dtype if stage in mixed or stage.startswith("align/") else None
    return 2 if (dtype or dense.get("dtype") or dense.get("torch_dtype")) in ("bfloat16", "float16") else 4


@dataclass(frozen=True)
class StageTraining:
    """The training of a stage."""

    settings: Training
    cost: ModelCost
    """What is computed for a token."""
    mixtures: list[dict[str, float]]
    """Domain → sampling weight; several are read in turn."""
    memory: MemoryNeeds

    @property
    def tokens(self) -> int:
        return self.settings.trained_tokens(self.memory.sequence_length)

    @property
    def flops(self) -> float:
        return self.tokens * self.cost.training_flops_per_token(self.memory.sequence_length)

    @property
    def memory_bytes(self) -> int:
        """Where it trains: at a step's peak, and on a CPU beside the copy of what is being written as a checkpoint."""
        copied = self.memory.checkpoint_bytes // self.memory.processes if self.memory.device == "cpu" else 0
        return self.memory.memory.peak + copied

    @property
    def trained(self) -> dict[str, Any]:
        """As in `StageCost`."""
        steps, rate = self.settings.steps(self.memory.sequence_length), self.settings.learning_rate
        return {"steps": steps, "mixture": _shares(self.mixtures), "learning_rate": rate}


def stage_trainings(recipe: Recipe, dense: dict[str, Any], *, device: str | None = None) -> dict[str, StageTraining]:
    """Name of each stage that trains → its training.

    Args:
        dense: the seed model's config, completed with its class's defaults.
        device: `cuda` or `cpu`, where its memory is taken; None: as the recipe says, on this machine.
    """
    trainings: dict[str, tuple[Training, ModelCost, list[dict[str, float]]]] = {}
    if recipe.seed_model.train is not None:
        trainings["seed"] = recipe.seed_model.train, config_cost(dense), [seed_mixture(recipe)]
    branch = config_cost(dense, trainable=recipe.train.trainable, lora_rank=recipe.train.lora.rank)
    for domain in recipe.train.domains:
        trainings[f"train/{domain}"] = recipe.branch_training(domain), branch, [domain_mixture(recipe, domain)]
    finetuning = finetuning_cost(recipe, dense, recipe.routing, recipe.finetune)
    trainings["finetune"] = recipe.finetune, finetuning, [finetune_mixture(recipe)]
    for stage, settings, cost in _aligned_costs(recipe, dense):
        trainings[stage] = settings, cost, []
    for name in recipe.baselines:
        for phase in matched_phases(recipe, name, dense):
            trainings[phase.stage] = phase.settings, phase.cost, phase.mixtures
    device = device or planned_device(recipe)
    return {
        stage: StageTraining(settings, cost, mixtures, MemoryNeeds(
            settings, cost.shape, recipe.data.sequence_length, device, may_freeze=may_freeze(stage),
            processes=recipe.launch.processes_of(stage),
        ))
        for stage, (settings, cost, mixtures) in trainings.items()
    }  # fmt: skip


def _aligned_costs(recipe: Recipe, dense: dict[str, Any]) -> Iterator[tuple[str, Finetune, ModelCost]]:
    """Stage, settings and cost of each section of `align`.

    Args:
        dense: the seed model's config, completed with its class's defaults.
    """
    for stage, settings in aligned_settings(recipe).items():
        section = recipe.alignments[stage.removeprefix("align/")]
        cost = moe_cost(
            recipe, dense, recipe.routing, dense_router_gradient=settings.dense_router_gradient,
            trainable=section.trainable, lora_rank=section.lora.rank,
        )  # fmt: skip
        if section.trainable == "lora":
            # An expert's adapter is added to its weights in every forward pass, and the sums stay until the backward.
            total = {**cost.shape.total, "experts": 2 * cost.shape.total["experts"]}
            cost = replace(cost, shape=replace(cost.shape, total=total))
        yield stage, settings, cost


def planned_device(recipe: Recipe) -> str:
    """`cuda` or `cpu`: where the recipe would train, on this machine unless it names the device."""
    return recipe.device if recipe.device != "auto" else choose_device("auto").type


def _shares(mixtures: list[dict[str, float]]) -> dict[str, float]:
    """Domain → its share of all tokens."""
    shares: dict[str, float] = {}
    for mixture in mixtures:
        total = sum(mixture.values()) * len(mixtures)
        for domain, weight in mixture.items():
            shares[domain] = shares.get(domain, 0.0) + weight / total
    return shares
