"""The mathematics of the merge methods: one file a method, pure functions of tensors; all are listed here.

Each returns float32 or float64, and what uses it rounds once. What methods there are and what sets them is in
`btx.choices.merges`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from btx.choices.merges import MERGE_METHODS, MergeSettings
from btx.errors import CheckpointError
from btx.mixing.merge import Merge, MergeFunction, mean
from btx.mixing.merge_methods.dare import dare
from btx.mixing.merge_methods.slerp import slerp
from btx.mixing.merge_methods.ties import ties
from btx.mixing.merge_methods.weighted import weighted


def bind(settings: MergeSettings, members: Sequence[str]) -> Merge:
    """The merge method as `mix` takes it.

    Args:
        members: names of the experts in order, the generalist among them if it is in.
    """
    if problems := settings.problems(members):
        raise CheckpointError("; ".join(problems))
    chosen = settings.as_json()
    density, scale, t = (cast(float, chosen.get(name, 0.0)) for name in ("density", "scale", "t"))
    weights = [(settings.weights or {}).get(member, 0.0) for member in members]
    functions: dict[str, MergeFunction] = {
        "mean": lambda values, start, name: mean(values),
        "seed": lambda values, start, name: start,
        "weighted": lambda values, start, name: weighted(values, weights),
        "slerp": lambda values, start, name: slerp(*values, t=t),
        "ties": lambda values, start, name: ties(start, values, density=density, scale=scale),
        "dare": lambda values, start, name: dare(
            start, values, density=density, scale=scale, key=f"{settings.rng_seed}/{name}"
        ),
    }
    return Merge(settings.method, functions[settings.method], MERGE_METHODS[settings.method].elementwise)
