"""Learning rate and optimiser of the paper (section 4.1): AdamW, linear warm-up, cosine to a share of the peak."""

from __future__ import annotations

import math

import torch
from torch import nn

from btx.moe.layer import weight_parts
from btx.recipe.training import Finetune, Training


def learning_rate(step: int, total_steps: int, settings: Training) -> float:
    """Learning rate of optimiser step `step` (counted from 0): warm-up, then cosine to the final share."""
    warmup = min(settings.warmup_steps, total_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup + 1) / max(1, total_steps - warmup)
    share = settings.final_learning_rate_share
    return settings.learning_rate * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def adamw(model: nn.Module, settings: Training) -> torch.optim.AdamW:
    """AdamW over the trainable weights of `model`; weight decay on matrices only, not on norms and biases.

    Each group has a `factor`: the multiple of the learning rate that its part of a MoE model trains with.
    """
    factors = settings.learning_rate_factors.model_dump() if isinstance(settings, Finetune) else {}
    parts = weight_parts(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((decay, factors.get(parts[name], 1.0)), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": members, "weight_decay": decay, "factor": factor} for (decay, factor), members in groups.items()],
        lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=1e-8, fused=True,
    )  # fmt: skip


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, each group's own multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
