"""The learning rate, step by step: linear warm-up, then one of the schedules; the paper's (section 4.1) is a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable

from btx.recipe.training import Training

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}
"""`decay_shape` → what is left, from 1 to 0, of the way from the peak to the end after a share of the decay's steps."""


def learning_rate(step: int, total_steps: int, settings: Training) -> float:
    """Learning rate of optimiser step `step` (counted from 0): warm-up, then as `schedule` says, to the final share.

    The warm-up of a constant rate, and of a stable phase, has as many steps however long the training is; so the steps
    before a decay are the same in a shorter and in a longer training.
    """
    warmup = min(settings.warmup_steps, total_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    falling, shape = total_steps - warmup, "cosine"
    if settings.schedule == "wsd":
        falling, shape = min(falling, max(1, round(settings.decay_share * total_steps))), settings.decay_shape
    if step < total_steps - falling:
        return settings.learning_rate
    progress = min(1.0, (step - (total_steps - falling) + 1) / max(1, falling))
    share = settings.final_learning_rate_share
    return settings.learning_rate * (share + (1 - share) * SHAPES[shape](progress))
