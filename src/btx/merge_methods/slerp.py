"""Spherical linear interpolation between two tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PARALLEL = 1e-4
"""Below this angle in radians (and as close to opposite) the formula divides by almost zero: a straight line then,
which differs by less than PARALLEL² / 8, that is 1.3e-9."""


def slerp(first: Tensor, second: Tensor, *, t: float) -> Tensor:
    """(sin((1-t)Ω) a + sin(tΩ) b) / sin Ω, Ω the angle between a and b seen as vectors.

    Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985, section 3.3. Where a tensor is zero, or
    both are parallel or opposite, there is no great circle to follow: the straight line is taken.
    """
    a, b = first.float(), second.float()
    norm_a, norm_b = float(a.norm()), float(b.norm())
    if not norm_a or not norm_b:
        return torch.lerp(a, b, t).to(first.dtype)
    unit_a, unit_b = a / norm_a, b / norm_b
    angle = 2 * math.atan2(float((unit_a - unit_b).norm()), float((unit_a + unit_b).norm()))  # exact where acos is not
    if min(angle, math.pi - angle) < PARALLEL:
        return torch.lerp(a, b, t).to(first.dtype)
    share_a, share_b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return (share_a * a + share_b * b).to(first.dtype)
