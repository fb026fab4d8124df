"""TIES-Merging: trim, elect sign and merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ties(seed: Tensor, tensors: Sequence[Tensor], *, density: float, scale: float) -> Tensor:
    """θ = θ_seed + λ τ_m, where τ_m is the mean over the trimmed task vectors that have the elected sign.

    Trim keeps the `density` share of a task vector's entries that are largest in magnitude. The sign elected for an
    entry is that of the sum of the trimmed values; zeros take no part, so the generalist has no say.

    Source: arXiv 2306.01708, section 3.2 and algorithm 1. The paper trims over all of a model's entries at once; here
    each tensor is trimmed on its own, since tensors are streamed.
    """
    start = seed.float()
    total, agreeing_sum, agreeing = (torch.zeros_like(start) for _ in range(3))
    trimmed = [_trim(tensor.float() - start, density) for tensor in tensors]
    for vector in trimmed:
        total += vector
    elected = total.sign()
    for vector in trimmed:
        agrees = (vector * elected) > 0
        agreeing_sum += torch.where(agrees, vector, 0.0)
        agreeing += agrees
    return (start + scale * agreeing_sum / agreeing.clamp(min=1)).to(seed.dtype)


def _trim(vector: Tensor, density: float) -> Tensor:
    """`vector` with all but the `density` share of its entries set to 0, the largest in magnitude kept."""
    flat = vector.flatten()
    kept = max(1, int(density * flat.numel()))
    if kept >= flat.numel():
        return vector
    places = flat.abs().topk(kept, sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, places, flat[places]).view_as(vector)
