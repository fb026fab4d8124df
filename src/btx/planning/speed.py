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
from btx.training.checkpoints import Checkpoints
from btx.training.eight_bit import is_installed
from btx.training.job import TrainingJob
from btx.training.optimizer import adamw
from btx.training.step import training_step

SECONDS = 4.0
"""Timing takes at most about that long, however slow or busy the machine is."""
LEAST_FLOPS = {"cpu": 5e9, "cuda": 5e12}
"""FLOPs of the first step on a device, at most: a model of which one layer and a few tokens are more is not timed."""
LEAST_TOKENS, GROWTH = 64, 4
MOST_VOCABULARY = 4096
"""Entries of the timed model's vocabulary: a large one takes long to make, and its product is one among others."""


@dataclass(frozen=True)
class Speed:
    """What one device reaches in training: a GPU, or the processors of a job."""

    flops_per_s: float
    """As FLOPs are counted in `btx.models.cost`."""
    source: str
    """Where the figure is from, in words."""
    threads: int | None = None
    """CPU threads it was reached with; None: a stage's threads do not matter."""


H100 = Speed(
    2.6e14, "one H100, as an earlier version trained a model of 1.2B there (docs/gpu.md), for here is no GPU to time"
)
"""29,055 tokens/s of 9.0e9 FLOPs each: Llama-3.2-1B's shape, sequences of 4096, all weights. Small models are slower,
bound by launching kernels."""


def measured_speed(run: RunFolder) -> Speed | None:
    """That of the run's first training stage, once it is done; None before."""
    for stage in run.graph:
        done = run.done(stage) if stage.trains else None
        if done and done.get("wall_s") and done["flops"]:
            on_gpu = run.recipe.device != "cpu" and torch.cuda.is_available()  # where threads do not matter
            reached, source = done["flops"] / done["wall_s"], f"as measured in {stage.name}"
            processes, threads = done.get("processes", 1), done.get("threads")  # each has so many
            if on_gpu:
                return Speed(reached / processes, source)
            return Speed(reached, source, threads and threads * processes)
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
    """Time training steps of a model of the seed model's shape as the branches are trained: device, precision, CPU
    threads, and as many layers and tokens of a micro-batch as `SECONDS` allow.

    Args:
        dense: the seed model's config, completed with its class's defaults.
        threads: CPU threads of a training job.

    Returns:
        The speed of the largest step that was timed; None if a layer of the model is too much work for a moment.
    """
    length = recipe.data.sequence_length
    whole = recipe.train.micro_batch(length)
    one, two = (config_cost(_small(dense, layers)) for layers in (1, 2))
    torch.zeros(1, device=device)  # a GPU takes seconds to wake
    before, started = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(threads)
    tokens, layers, reached, seconds = min(LEAST_TOKENS, whole), 1, 0.0, 0.0
    if tokens * one.training_flops_per_token(tokens) > LEAST_FLOPS.get(device.type, LEAST_FLOPS["cpu"]):
        return None
    try:
        while 2 * GROWTH * seconds < SECONDS - (time.perf_counter() - started):
            S = min(length, tokens)
            tokens = tokens // S * S
            with torch.random.fork_rng(devices=[]):
                seconds = _step_seconds(recipe, _small(dense, layers), device, tokens, S)
            per_token, more = one.training_flops_per_token(S), two.training_flops_per_token(S)
            reached = tokens * (per_token + (layers - 1) * (more - per_token)) / seconds
            if tokens < whole:
                tokens = min(GROWTH * tokens, whole)
            elif layers < int(dense["num_hidden_layers"]):
                layers = min(GROWTH * layers, int(dense["num_hidden_layers"]))
            else:
                break
    finally:
        torch.set_num_threads(before)
    source = "training steps of a model like the seed model timed just now"
    if device.type != "cpu":
        return Speed(reached, f"{source}, {device}")
    return Speed(reached, f"{source}, {threads} CPU thread{'s' if threads > 1 else ''}", threads)


def _small(dense: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config with fewer layers and a small vocabulary."""
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = dense | special | {"num_hidden_layers": layers, "vocab_size": min(dense["vocab_size"], MOST_VOCABULARY)}
    if types := dense.get("layer_types"):
        config["layer_types"] = (types * 2)[:layers]
    return config


def _step_seconds(recipe: Recipe, config: dict[str, Any], device: torch.device, tokens: int, length: int) -> float:
    """Seconds of a step of `tokens` tokens in sequences of `length`: the median of up to four."""
    values = dict(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    model, settings = model.to(device).train(), recipe.train
    if not is_installed():  # a plan for another machine: the update is a small part of a step
        settings = settings.model_copy(update={"optimizer": "adamw", "weights": "float32"})
    job = TrainingJob(
        model=model, mixture=RandomSamples(int(config["vocab_size"]), length), settings=settings, folder=Path(),
        checkpoints=Checkpoints(), flops_per_token=0.0, rng_seed=0, device=device,
    )  # fmt: skip
    optimizer, seconds = adamw(model, settings), list[float]()
    while len(seconds) < 2 or (len(seconds) < 5 and sum(seconds) < SECONDS / 10):
        started = time.perf_counter()
        training_step(job, optimizer, len(seconds), tokens // length)  # its loss is a number: nothing is left running
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])  # the first one allocates
