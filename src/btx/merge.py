"""Merge methods for shared weights: pure functions of tensors.

A merge method takes the same tensor from every member (the expert models, then the generalist), and the seed model's,
and returns one. The task vector of an expert is its tensor minus the seed model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MergeFunction = Callable[[Sequence[Tensor], Tensor, str], Tensor]
"""(members' values, seed model's value, tensor name) → merged value in float32 or float64; the caller casts it, once.
The values are views of files: a merge function must not write into them."""


@dataclass(frozen=True)
class Merge:
    """A merge method as `mix` takes it."""

    name: str
    function: MergeFunction
    elementwise: bool
    """Every element of the result depends on the same element of the inputs alone. Then tensors are merged in blocks,
    and memory does not grow with the largest tensor."""
    description: str = ""


def mean(values: Sequence[Tensor], start: Tensor | None = None, name: str = "") -> Tensor:
    """Plain mean (paper, section 2.2), in float64: rounded once by the caller, it is the value nearest to the mean.

    Accumulating in bfloat16 instead would add 40 % to the rounding error.
    """
    total = values[0].to(torch.float64, copy=True)
    for value in values[1:]:
        total += value
    return total.div_(len(values))


MERGES: dict[str, Merge] = {
    "mean": Merge("mean", mean, elementwise=True, description="mean of the shared weights (paper, section 2.2)"),
}
