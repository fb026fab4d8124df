"""Merge methods for shared weights, and what is measured about them: pure functions of tensors.

A merge method takes the same tensor from every model and returns one. The task vector of an expert is its tensor
minus the seed model's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """Plain mean, accumulated in float32 and cast once (paper, section 2.2).

    Accumulating in bfloat16 instead would add 40 % to the rounding error.
    """
    total = tensors[0].float().clone()
    for tensor in tensors[1:]:
        total += tensor.float()
    return (total / len(tensors)).to(tensors[0].dtype)


def cosines(task_vectors: Sequence[Tensor]) -> list[list[float | None]]:
    """Cosine between each pair of task vectors; None where a task vector is zero.

    Averaging keeps what experts agree on: cosines near 1 mean that the mean loses nothing, cosines near 0 that every
    expert keeps only 1/N of its own change.
    """
    flat = [vector.flatten().double() for vector in task_vectors]
    norms = [float(vector.norm()) for vector in flat]
    return [
        [float(a @ b) / (norm_a * norm_b) if norm_a and norm_b else None for b, norm_b in zip(flat, norms, strict=True)]
        for a, norm_a in zip(flat, norms, strict=True)
    ]


def norm_ratio(task_vectors: Sequence[Tensor]) -> float | None:
    """‖mean Δ‖ / mean ‖Δ‖: 1 when the experts moved alike, 1/√N when they moved apart; None when none moved."""
    stacked = torch.stack([vector.flatten().double() for vector in task_vectors])
    mean_norm = float(stacked.norm(dim=1).mean())
    return float(stacked.mean(dim=0).norm()) / mean_norm if mean_norm else None
