"""What a merge method for shared weights is, and the mean; `btx.mixing.merge_methods` has the others and lists all.

A merge method takes the same tensor from every member (the expert models, then the generalist), and the seed model's,
and returns one. The task vector of an expert is its tensor minus the seed model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from btx.model_files.lazy_tensors import nearest_odd

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


def mean(values: Sequence[Tensor]) -> Tensor:
    """Plain mean (paper, section 3.2). Rounded once by the caller, it is the value nearest to the exact mean.

    Accumulating in bfloat16 instead would add 40 % to the rounding error. 16-bit values are added in float32, wider
    ones in float64.

    Returns:
        float32 for 16-bit values of one type, to be rounded to that type; float64 otherwise.
    """
    kinds = {value.dtype for value in values}
    if len(kinds) == 1 and kinds <= {torch.bfloat16, torch.float16}:
        return _mean_of_16_bits(values)
    total = values[0].to(torch.float64, copy=True)
    for value in values[1:]:
        total += value
    return total.div_(len(values))


def _mean_of_16_bits(values: Sequence[Tensor]) -> Tensor:
    """The mean in float32, made right where float32's own rounding could decide how the result is rounded to 16 bits.

    The error of sum and quotient is below 2⁻²³ N max|x|; the few elements that this could carry over a rounding
    boundary are computed again in float64. Several times as fast as float64 throughout.
    """
    dtype, largest = values[0].dtype, 0.0
    total = torch.zeros(values[0].shape)
    for value in values:
        wide = value.float()
        total += wide
        low, high = torch.aminmax(wide)
        largest = max(largest, -float(low), float(high))
    total /= len(values)
    slack = 2.0**-23 * len(values) * largest
    is_unsure = (total - slack).to(dtype) != (total + slack).to(dtype)
    if len(values) * largest > torch.finfo(torch.float32).max:
        is_unsure |= ~total.isfinite()  # the sum overflowed, the mean need not
    unsure = is_unsure.flatten().nonzero()[:, 0]
    if len(unsure):
        exact = torch.stack([value.flatten()[unsure].double() for value in values]).mean(dim=0)
        total.view(-1)[unsure] = nearest_odd(exact)
    return total
