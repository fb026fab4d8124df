"""Learning rate and optimiser of the paper (section 4.1): AdamW, linear warm-up, cosine to a share of the peak."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from btx.recipe import Training


def learning_rate(step: int, total_steps: int, settings: Training) -> float:
    """Learning rate of optimiser step `step` (counted from 0): warm-up, then cosine to the final share."""
    warmup = min(settings.warmup_steps, total_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup + 1) / max(1, total_steps - warmup)
    share = settings.final_learning_rate_share
    return settings.learning_rate * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], settings: Training) -> torch.optim.AdamW:
    """AdamW over the trainable `parameters`; weight decay on matrices only, not on norms and biases."""
    trainable = [parameter for _, parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=1e-8, fused=True,
    )  # fmt: skip
