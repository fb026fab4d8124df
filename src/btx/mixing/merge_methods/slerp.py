"""Spherical linear interpolation between two tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from btx.mixing.merge_methods.blocks import flat_blocks

PARALLEL = 1e-4
"""Below this angle in radians (and as close to opposite) the formula divides by almost zero: a straight line then,
which differs by less than PARALLEL² / 8, that is 1.3e-9."""


def slerp(first: Tensor, second: Tensor, *, t: float) -> Tensor:
    """(sin((1-t)Ω) a + sin(tΩ) b) / sin Ω in float32, Ω the angle between a and b seen as vectors.

    Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985, section 3.3. Where a tensor is zero, or
    both are parallel or opposite, there is no great circle to follow: the straight line is taken.
    """
    share_a, share_b = _shares(angle(first, second), t)
    a, b, result = first.flatten(), second.flatten(), torch.empty(first.numel())
    for block in flat_blocks(first):
        result[block] = share_a * a[block].float() + share_b * b[block].float()
    return result.view_as(first)


def angle(first: Tensor, second: Tensor) -> float:
    """Angle between two tensors in radians; 0 if one of them is zero.

    2·atan2(‖u-v‖, ‖u+v‖) of the unit vectors is exact where the arc cosine is not (Kahan 2006).
    """
    a, b = first.flatten(), second.flatten()
    squares_a = squares_b = difference = total = 0.0
    for block in flat_blocks(first):
        squares_a += float(a[block].double().square().sum())
        squares_b += float(b[block].double().square().sum())
    if not squares_a or not squares_b:
        return 0.0
    for block in flat_blocks(first):
        unit_a, unit_b = a[block].double() / math.sqrt(squares_a), b[block].double() / math.sqrt(squares_b)
        difference += float((unit_a - unit_b).square().sum())
        total += float((unit_a + unit_b).square().sum())
    return 2 * math.atan2(math.sqrt(difference), math.sqrt(total))


def _shares(omega: float, t: float) -> tuple[float, float]:
    """What is taken of both tensors."""
    if min(omega, math.pi - omega) < PARALLEL:
        return 1 - t, t
    return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)
