"""Work on large tensors a block at a time, so that a merge needs little more memory than its result."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**21


def flat_blocks(tensor: Tensor) -> Iterator[slice]:
    """Slices that cover the flattened `tensor`."""
    for start in range(0, tensor.numel(), BLOCK_ELEMENTS):
        yield slice(start, min(start + BLOCK_ELEMENTS, tensor.numel()))


def empty_like(tensor: Tensor) -> Tensor:
    """A flat float32 tensor for a result of the size of `tensor`."""
    return torch.empty(tensor.numel(), dtype=torch.float32)
