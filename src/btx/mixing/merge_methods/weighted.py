"""Weighted mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i θ_i / Σ w_i in float64.

    Source: Model soups, arXiv 2203.05482, section 2, with weights instead of the plain mean.
    """
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.double(), alpha=weight / sum(weights))
    return total
