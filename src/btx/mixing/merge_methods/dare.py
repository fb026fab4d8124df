"""DARE: drop and rescale task vectors, then merge them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from btx.mixing.merge_methods.blocks import flat_blocks


def dare(seed: Tensor, tensors: Sequence[Tensor], *, density: float, scale: float, key: str) -> Tensor:
    """θ = θ_seed + λ/N Σ_i (m_i ⊙ δ_i) / (1-p) in float32, m_i ~ Bernoulli(1-p), δ_i the task vector, 1-p = `density`.

    In expectation it is the mean over the N models (the generalist is one of them); with density 1 it is the mean.

    Args:
        key: what the random numbers depend on, besides the number of the model: the same key drops the same entries.

    Source: arXiv 2311.03099, equations 2 and 3, and average merging of section 3.3.
    """
    start, result = seed.flatten(), torch.empty(seed.numel())
    flat = [tensor.flatten() for tensor in tensors]
    generators = [_generator(f"{key}/{number}") for number in range(len(tensors))]
    for block in flat_blocks(seed):
        origin = start[block].float()
        total = torch.zeros_like(origin)
        for tensor, generator in zip(flat, generators, strict=True):
            kept = torch.rand(len(origin), generator=generator) < density
            total += torch.where(kept, tensor[block].float() - origin, 0.0)
        result[block] = origin + total * (scale / density / len(tensors))
    return result.view_as(seed)


def _generator(key: str) -> torch.Generator:
    """A generator of its own for every key, the same on every machine."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
