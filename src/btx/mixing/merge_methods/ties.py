"""TIES-Merging: trim, elect sign and merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from btx.mixing.merge_methods.blocks import flat_blocks


def ties(seed: Tensor, tensors: Sequence[Tensor], *, density: float, scale: float) -> Tensor:
    """θ = θ_seed + λ τ_m in float32, τ_m the mean over the trimmed task vectors that have the elected sign.

    Trim keeps the `density` share of a task vector's entries that are largest in magnitude, and what equals the
    smallest of them. The sign elected for an entry is that of the sum of the trimmed values; zeros take no part, so the
    generalist has no say.

    Source: arXiv 2306.01708, section 3.2 and algorithm 1. The paper trims over all of a model's entries at once; here
    each tensor is trimmed on its own, since tensors are streamed.
    """
    start, result = seed.flatten(), torch.empty(seed.numel())
    flat = [tensor.flatten() for tensor in tensors]
    thresholds = [_threshold(tensor, start, density) for tensor in flat]
    for block in flat_blocks(seed):
        origin = start[block].float()
        vectors = [tensor[block].float() - origin for tensor in flat]
        trimmed = torch.stack([
            torch.where(vector.abs() >= threshold, vector, 0.0)
            for vector, threshold in zip(vectors, thresholds, strict=True)
        ])  # fmt: skip
        agrees = trimmed * trimmed.sum(dim=0).sign() > 0
        merged = torch.where(agrees, trimmed, 0.0).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
        result[block] = origin + scale * merged
    return result.view_as(seed)


def _threshold(tensor: Tensor, start: Tensor, density: float) -> Tensor:
    """Magnitude of the smallest entry that trimming keeps; at least one entry is kept."""
    magnitudes = torch.empty(start.numel())
    for block in flat_blocks(start):
        magnitudes[block] = (tensor[block].float() - start[block].float()).abs()
    kept = max(1, int(density * magnitudes.numel()))
    return magnitudes.kthvalue(magnitudes.numel() - kept + 1).values
