"""Whether every training of a run fits into a GPU's memory, and which settings make it fit: `btx plan --gpu-memory`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from btx.choices.baselines import DOMAINS
from btx.planning.costs import StageTraining, planned_device, stage_trainings
from btx.recipe.schema import Recipe

CONTEXT = 600_000_000
"""Bytes that CUDA, its libraries and torch take before the first tensor, about."""
USABLE_SHARE = 0.97
"""Of a GPU's memory; the rest is lost between the allocator's blocks."""


def memory_rows(recipe: Recipe, dense: dict[str, Any], gpu_memory: int) -> list[dict[str, Any]]:
    """A row a stage that trains, for one training on the GPU at a time.

    Args:
        dense: the seed model's config, completed with its class's defaults.
        gpu_memory: bytes of each GPU; a stage has as many as `launch.processes` says.

    Returns:
        {"stage", "processes", "memory_bytes": the predicted peak of each, "processes_that_fit": the fewest with which
        it fits and all else stays, None where no number does, "parts": {"weights", "gradients", "optimizer",
        "activations", "logits", "workspace"} in bytes, "micro_batch_tokens", "fits", "section": where the recipe has
        its settings, "change": {setting: value} that makes it fit, empty where it fits, None where nothing does,
        "memory_bytes_after" and "micro_batch_tokens_after": with these changes, None likewise}.
    """
    trainings = stage_trainings(recipe, dense, device="cuda")
    return [_row(stage, training, gpu_memory) for stage, training in trainings.items()]


def usable(gpu_memory: int) -> int:
    """What tensors can take of a GPU's memory."""
    return int(USABLE_SHARE * gpu_memory) - CONTEXT


def _row(stage: str, training: StageTraining, gpu_memory: int) -> dict[str, Any]:
    now = training.memory.with_changes({})
    fitting = training.memory.that_fits(usable(gpu_memory))
    if fitting is not None and not fitting.changed:
        now = fitting  # with `micro_batch_tokens: auto` the largest that fits
    return {
        "stage": stage,
        "processes": training.memory.processes,
        "processes_that_fit": training.memory.processes_that_fit(usable(gpu_memory)),
        "memory_bytes": now.memory.peak,
        "parts": asdict(now.memory),
        "micro_batch_tokens": now.micro_batch_tokens,
        "fits": now is fitting,
        "section": _section(stage),
        "change": None if fitting is None else fitting.changed,
        "memory_bytes_after": None if fitting is None else fitting.memory.peak,
        "micro_batch_tokens_after": None if fitting is None else fitting.micro_batch_tokens,
    }


def _section(stage: str) -> str:
    """Where the recipe says how a stage trains; of a baseline, which may have a micro-batch of its own, the run's."""
    kind = stage.partition("/")[0]
    if kind == "baselines":
        return "train" if stage.endswith(DOMAINS) else "finetune"
    if kind == "align":
        return stage.replace("/", ".")
    return "seed_model.train" if kind == "seed" else kind


def gpu_here(recipe: Recipe) -> int | None:
    """Bytes of this machine's GPU, None where there is none or the recipe does not train on it."""
    if planned_device(recipe) != "cuda" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)
