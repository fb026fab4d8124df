"""Work on large tensors a block at a time, so that a merge needs little more memory than its result."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

BLOCK_ELEMENTS = 2**21


def flat_blocks(tensor: Tensor) -> Iterator[slice]:
    """Slices that cover the flattened `tensor`."""
    for start in range(0, tensor.numel(), BLOCK_ELEMENTS):
        yield slice(start, min(start + BLOCK_ELEMENTS, tensor.numel()))
