"""How a new router starts. The paper does not say; N(0, 0.02) is what re-implementations use."""

from __future__ import annotations

import torch
from torch import Tensor


def random(num_experts: int, hidden_size: int, *, std: float, rng_seed: int, layer: int) -> Tensor:
    """N(0, std²) router weights (E, D), float32, from a generator of their own.

    Each layer has its own stream, so a layer's router does not depend on how many layers there are.
    """
    generator = torch.Generator().manual_seed(rng_seed * 1_000_003 + layer)
    return torch.randn(num_experts, hidden_size, generator=generator) * std
