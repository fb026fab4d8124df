"""How fast this machine trains: the FLOP/s from which `btx plan` tells hours.

A few steps of the real training loop, on random tokens and random weights of the seed model's shape. What it cannot
know: other work on the machine, jobs that compete for memory, and that a MoE model's FLOPs take a little longer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from btx.data.mixture import Batch
from btx.models.cost import config_cost
from btx.recipe.schema import Recipe
from btx.run_folder.folder import RunFolder
from btx.training.checkpoints import NoCheckpoints
from btx.training.loop import TrainingJob, training_step
from btx.training.schedule import adamw

SECONDS = 0.5
"""Steps are timed for that long, three of them at least."""
MOST_FLOPS = {"cpu": 3e11, "cuda": 3e13}
"""FLOPs of a step on a device, at most: deeper models are timed with fewer layers, wider ones not at all."""


@dataclass(frozen=True)
class Speed:
    """What one training job reaches."""

    flops_per_s: float
    """As FLOPs are counted in `btx.models.cost`."""
    source: str
    """Where the figure is from, in words."""
    threads: int | None = None
    """CPU threads it was reached with; None: a stage's threads do not matter."""


def measured_speed(run: RunFolder) -> Speed | None:
    """That of the run's first training stage, once it is done; None before."""
    for stage in run.graph:
        done = run.done(stage) if stage.trains else None
        if done and done.get("wall_s") and done["flops"]:
            on_gpu = run.recipe.device != "cpu" and torch.cuda.is_available()  # where threads do not matter
            threads = None if on_gpu else done.get("threads")
            return Speed(done["flops"] / done["wall_s"], f"as measured in {stage.name}", threads)
    return None


class RandomSamples:
    """Random tokens in place of a mixture: the speed does not depend on what is read.

    Args:
        vocab_size: token ids are drawn below it.
        sequence_length: S, tokens of a sample.
    """

    def __init__(self, vocab_size: int, sequence_length: int) -> None:
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length

    @property
    def fingerprint(self) -> str:
        """The same for all: nothing that is kept is made from them."""
        return "random"

    def batch(self, start: int, count: int) -> Batch:
        """Samples start, ..., start + count - 1 as the rows of a batch."""
        shape = (count, self.sequence_length)
        ids = np.random.default_rng(start).integers(0, self.vocab_size, shape)
        return Batch(ids, np.roll(ids, -1, axis=1), np.broadcast_to(np.arange(shape[1]), shape).copy())


def training_speed(recipe: Recipe, dense: dict[str, Any], device: torch.device, threads: int) -> Speed | None:
    """Time training steps of a model of the seed model's shape as the branches are trained: device, precision,
    micro-batch, CPU threads. Takes seconds.

    Args:
        dense: the seed model's config, completed with its class's defaults.
        threads: CPU threads of a training job.

    Returns:
        The median step's speed; None if a single layer of the model is too much work for a moment.
    """
    length = recipe.data.sequence_length
    tokens = max(length, recipe.train.micro_batch_tokens // length * length)
    config = _shallow(dense, tokens, length, MOST_FLOPS.get(device.type, MOST_FLOPS["cpu"]))
    if config is None:
        return None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            seconds = _step_seconds(recipe, config, device, tokens)
    finally:
        torch.set_num_threads(before)
    flops = tokens * config_cost(config).training_flops_per_token(length)
    source = "training steps of the seed model timed just now"
    if device.type != "cpu":
        return Speed(flops / seconds, f"{source}, {device}")
    return Speed(flops / seconds, f"{source}, {threads} CPU thread{'s' if threads > 1 else ''}", threads)


def _shallow(dense: dict[str, Any], tokens: int, length: int, most: float) -> dict[str, Any] | None:
    """The config with as many layers as `most` FLOPs a step allow; None if not even one."""

    def flops(layers: int) -> float:
        return tokens * config_cost(_with_layers(dense, layers)).training_flops_per_token(length)

    all_layers = int(dense["num_hidden_layers"])
    if flops(1) > most:
        return None
    layers = 1 + int((most - flops(1)) / (flops(2) - flops(1)))
    return _with_layers(dense, min(layers, all_layers))


def _with_layers(dense: dict[str, Any], layers: int) -> dict[str, Any]:
    config = dense | {"num_hidden_layers": layers}
    if types := dense.get("layer_types"):
        config["layer_types"] = (types * 2)[:layers]
    return config


def _step_seconds(recipe: Recipe, config: dict[str, Any], device: torch.device, tokens: int) -> float:
    values = dict(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    model = model.to(device).train()
    length = recipe.data.sequence_length
    job = TrainingJob(
        model=model, mixture=RandomSamples(int(config["vocab_size"]), length), settings=recipe.train, folder=Path(),
        checkpoints=NoCheckpoints(), flops_per_token=0.0, rng_seed=0, device=device,
    )  # fmt: skip
    optimizer, seconds = adamw(model, recipe.train), list[float]()
    while len(seconds) < 4 or sum(seconds) < SECONDS:
        started = time.perf_counter()
        training_step(job, optimizer, len(seconds), tokens // length)  # its loss is a number: nothing is left running
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])  # the first one allocates
