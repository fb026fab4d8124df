"""The ways to start routers there are, what each is set by, and when it cannot work. No torch.

The mathematics is in `btx.mixing.router_init`; what is computed from text, in `btx.mixing.router_fit`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RouterInitMethod:
    """What there is to know of a way to start routers without importing torch."""

    summary: str
    parameters: tuple[str, ...] = ()
    """Fields of `RouterInit` it takes."""
    needs_text: bool = False
    """Text of every expert's domain decides the routers."""
    scale: float | None = None


ROUTER_INITS: dict[str, RouterInitMethod] = {
    "random": RouterInitMethod("normal with standard deviation `router_std`", ("std", "rng_seed")),
    "zeros": RouterInitMethod("all logits 0: every token goes to the same experts until training tells them apart"),
    "hidden_mean": RouterInitMethod(
        "direction of the domain's mean hidden state away from the mean of all domains; needs text",
        ("scale", "tokens"), needs_text=True, scale=1.0,
    ),
    "ridge": RouterInitMethod(
        "ridge regression on domain labels (DUME, arXiv 2603.29765); needs text",
        ("ridge", "scale", "tokens"), needs_text=True, scale=10.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class RouterInit:
    """How routers start: a method and its parameters; None is the method's default."""

    method: str = "random"
    """A name in `ROUTER_INITS`."""
    std: float = 0.02
    """random: standard deviation."""
    scale: float | None = None
    """hidden_mean, ridge: factor on the weights; the larger, the nearer the first expert's gate is to 1."""
    ridge: float = 1e-3
    """ridge: λ as a multiple of the mean of XᵀX's diagonal."""
    tokens: int = 50_000
    """hidden_mean, ridge: tokens read of each text, at most."""
    rng_seed: int = 0

    @property
    def needs_text(self) -> bool:
        """Whether text of every expert's domain decides the routers."""
        return self.method in ROUTER_INITS and ROUTER_INITS[self.method].needs_text

    @property
    def factor(self) -> float:
        """`scale`, or the method's default; 1 where a method has none."""
        default = ROUTER_INITS[self.method].scale
        return next(factor for factor in (self.scale, default, 1.0) if factor is not None)

    def problems(self) -> list[str]:
        """Why these settings are impossible; empty if they are not."""
        if self.method not in ROUTER_INITS:
            return [f"router_init {self.method!r}: no such method; there are: {', '.join(ROUTER_INITS)}"]
        problems = []
        if self.scale is not None and "scale" not in ROUTER_INITS[self.method].parameters:
            scaled = [name for name, method in ROUTER_INITS.items() if "scale" in method.parameters]
            problems.append(f"router_init {self.method} takes no scale; {' and '.join(scaled)} do")
        for name, value in (("std", self.std), ("scale", self.factor), ("ridge's λ", self.ridge)):
            if not 0 < value < math.inf:
                problems.append(f"router_init {self.method}: {name} is {value}; it has to be above 0, and finite")
        if self.tokens < 2:
            problems.append(f"router_init {self.method}: {self.tokens} tokens of text; it takes at least 2")
        return problems

    def as_json(self) -> dict[str, object]:
        """The method and the parameters it uses, defaults filled in."""
        values = {"scale": self.factor} | {name: getattr(self, name) for name in ("std", "rng_seed", "ridge", "tokens")}
        return {"method": self.method, **{name: values[name] for name in ROUTER_INITS[self.method].parameters}}
