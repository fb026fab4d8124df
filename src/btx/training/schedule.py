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
    if step < (begins := steps_before_decay(total_steps, settings)):
        return settings.learning_rate
    begins, shape = (begins, settings.decay_shape) if settings.schedule == "wsd" else (warmup, "cosine")
    progress = min(1.0, (step - begins + 1) / max(1, total_steps - begins))
    share = settings.final_learning_rate_share
    return settings.learning_rate * (share + (1 - share) * SHAPES[shape](progress))


def steps_before_decay(total_steps: int, settings: Training) -> int:
    """Steps whose learning rate is the same however long the training is: none of a cosine, or of a training that is
    shorter than its warm-up."""
    if settings.schedule == "cosine" or total_steps < settings.warmup_steps:
        return 0
    if settings.schedule == "constant":
        return total_steps
    falling = max(1, round(settings.decay_share * total_steps))
    return max(settings.warmup_steps, total_steps - falling)
