"""Learning rate and optimiser of the paper (section 4.1): AdamW, linear warm-up, cosine to a share of the peak."""

from __future__ import annotations

import math

from btx.recipe.training import Training


def learning_rate(step: int, total_steps: int, settings: Training) -> float:
    """Learning rate of optimiser step `step` (counted from 0): warm-up, then cosine to the final share."""
    warmup = min(settings.warmup_steps, total_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup + 1) / max(1, total_steps - warmup)
    share = settings.final_learning_rate_share
    return settings.learning_rate * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
