"""The merge methods there are, what each is set by, and when it cannot work. No torch.

A merge method makes one tensor of the same tensor from several models; it is used for the shared weights of a mix. The
mathematics is in `btx.mixing.merge_methods`, one file a method. The task vector of an expert is its tensor minus the
seed model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

DENSITY = {"ties": 0.2, "dare": 0.5}
"""Default `density`: what TIES-Merging uses throughout; DARE searches per task, so the middle of its range."""


@dataclass(frozen=True)
class MergeMethod:
    """What there is to know of a method without importing torch."""

    summary: str
    parameters: tuple[str, ...] = ()
    """Fields of `MergeSettings` it takes."""
    elementwise: bool = False
    """Every element of the result depends on the same element of the inputs alone, so tensors are merged in blocks."""

    @property
    def described(self) -> str:
        """One line for a list."""
        return self.summary + (f"; takes {', '.join(self.parameters)}" if self.parameters else "")


MERGE_METHODS: dict[str, MergeMethod] = {
    "mean": MergeMethod(
        "float32 mean over all experts, the generalist included (paper, section 3.2)", elementwise=True
    ),
    "seed": MergeMethod(
        "the seed model's own weights; right for experts whose shared weights were frozen", elementwise=True
    ),
    "weighted": MergeMethod(
        "mean with a weight an expert (model soups, arXiv 2203.05482)", ("weights",), elementwise=True
    ),
    "slerp": MergeMethod("along the great circle between exactly two models (Shoemake 1985)", ("t",)),
    "ties": MergeMethod("trim, elect signs, mean of those that agree (arXiv 2306.01708)", ("density", "scale")),
    "dare": MergeMethod("drop task vector entries at random, rescale, mean (arXiv 2311.03099)", ("density", "scale")),
}


@dataclass(frozen=True)
class MergeSettings:
    """A method and its parameters; None is the method's default."""

    method: str = "mean"
    weights: Mapping[str, float] | None = None
    """weighted: expert name → weight; normalised."""
    t: float | None = None
    """slerp: 0 is the first model, 1 the second; default 0.5."""
    density: float | None = None
    """ties, dare: share of every task vector's entries that is kept; default 0.2 and 0.5."""
    scale: float | None = None
    """ties, dare: factor λ on the merged task vector; default 1."""
    rng_seed: int = field(default=0, compare=False)
    """dare: random number seed of what is dropped."""

    def problems(self, members: Sequence[str]) -> list[str]:
        """Why these settings cannot merge the models called `members`; empty if they can."""
        method = MERGE_METHODS.get(self.method)
        if method is None:
            return [f"merge {self.method!r}: no such method; there are: {', '.join(MERGE_METHODS)}"]
        problems = [
            f"merge {self.method} takes no {name}; it takes: {', '.join(method.parameters) or 'nothing'}"
            for name in ("weights", "t", "density", "scale")
            if getattr(self, name) is not None and name not in method.parameters
        ]
        if self.method == "slerp" and len(members) != 2:
            problems.append(
                f"merge slerp takes exactly two models, the generalist counted; given: {', '.join(members)}"
            )
        if self.method == "weighted":
            problems += _weight_problems(self.weights or {}, members)
        if self.t is not None and not 0 <= self.t <= 1:
            problems.append(f"merge slerp: t is {self.t}; allowed: 0 to 1")
        if self.density is not None and not 0 < self.density <= 1:
            problems.append(f"merge {self.method}: density is {self.density}; allowed: above 0, at most 1")
        if self.scale is not None and not 0 < self.scale < math.inf:
            problems.append(f"merge {self.method}: scale is {self.scale}; allowed: above 0, and finite")
        return problems

    def as_json(self) -> dict[str, object]:
        """The method and the parameters it uses, defaults filled in."""
        values = {
            "weights": dict(self.weights or {}), "t": 0.5 if self.t is None else self.t,
            "density": self.density or DENSITY.get(self.method), "scale": 1.0 if self.scale is None else self.scale,
        }  # fmt: skip
        used = {name: values[name] for name in MERGE_METHODS[self.method].parameters}
        return {"method": self.method, **used, **({"rng_seed": self.rng_seed} if self.method == "dare" else {})}


def _weight_problems(weights: Mapping[str, float], members: Sequence[str]) -> list[str]:
    missing = [name for name in members if name not in weights]
    unknown = [name for name in weights if name not in members]
    problems = []
    if missing:
        problems.append(f"merge weighted needs a weight for every expert; none for {', '.join(missing)}")
    if unknown:
        problems.append(f"merge weighted: there is no expert {', '.join(unknown)}; there are: {', '.join(members)}")
    if any(weight < 0 for weight in weights.values()) or not 0 < sum(weights.values()) < math.inf:
        problems.append("merge weighted: weights are finite and not negative, and one has to be above 0")
    return problems
