"""How a new router starts: pure functions of tensors.

The paper does not say; N(0, 0.02) is what re-implementations use. `hidden_mean` and `ridge` are computed from sums over
the router's inputs on text of every expert's domain, so that the mixed model routes sensibly before any finetuning.
Adding text or an expert only adds to the sums.

Shape letters: T tokens, D model, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROUTER_INITS: dict[str, str] = {
    "random": "normal with standard deviation `router_std`",
    "zeros": "all logits 0: every token goes to the same experts until training tells them apart",
    "hidden_mean": "direction of the domain's mean hidden state away from the mean of all domains; needs text",
    "ridge": "ridge regression on domain labels (DUME, arXiv 2603.29765); needs text",
}
NEED_TEXT = ("hidden_mean", "ridge")
SCALE = {"hidden_mean": 1.0, "ridge": 10.0}
RIDGE = 1e-3


@dataclass(frozen=True)
class RouterSettings:
    """A way to start routers and its parameters; None is the default."""

    method: str = "random"
    std: float = 0.02
    """random: standard deviation."""
    scale: float | None = None
    """hidden_mean, ridge: factor on the weights; the larger, the nearer the first expert's gate is to 1."""
    ridge: float = RIDGE
    """ridge: λ as a multiple of the mean of XᵀX's diagonal."""
    tokens: int = 50_000
    """hidden_mean, ridge: tokens read of each text, at most."""
    rng_seed: int = 0
    """random: random number seed."""

    @property
    def needs_text(self) -> bool:
        """Whether text of every expert's domain decides the routers."""
        return self.method in NEED_TEXT

    def problems(self) -> list[str]:
        """Why these settings are impossible; empty if they are not."""
        if self.method not in ROUTER_INITS:
            return [f"router_init {self.method!r}: no such method; there are: {', '.join(ROUTER_INITS)}"]
        found = []
        if self.scale is not None and not self.needs_text:
            found.append(f"router_init {self.method} takes no scale; hidden_mean and ridge do")
        if self.ridge <= 0:
            found.append(f"router_init ridge: λ is {self.ridge}; it has to be above 0")
        if self.tokens < 2:
            found.append(f"router_init {self.method}: {self.tokens} tokens of text; it takes at least 2")
        return found

    def as_json(self) -> dict[str, object]:
        """The method and the parameters it uses, defaults filled in."""
        text: dict[str, object] = {"scale": self.scale or SCALE.get(self.method), "tokens": self.tokens}
        used: dict[str, dict[str, object]] = {
            "random": {"std": self.std, "rng_seed": self.rng_seed},
            "hidden_mean": text,
            "ridge": {"ridge": self.ridge, **text},
        }
        return {"method": self.method, **used.get(self.method, {})}


def random(num_experts: int, hidden_size: int, *, std: float, rng_seed: int, layer: int) -> Tensor:
    """N(0, std²) router weights (E, D), float32, from a generator of their own.

    Each layer has its own stream, so a layer's router does not depend on how many layers there are.
    """
    generator = torch.Generator().manual_seed(rng_seed * 1_000_003 + layer)
    return torch.randn(num_experts, hidden_size, generator=generator) * std


def initial_router(settings: RouterSettings, num_experts: int, hidden_size: int) -> Callable[[int], Tensor]:
    """Layer → router weight (E, D), float32; zeros where text will decide."""
    if settings.method != "random":
        return lambda layer: torch.zeros(num_experts, hidden_size)
    return lambda layer: random(
        num_experts, hidden_size, std=settings.std, rng_seed=settings.rng_seed, layer=layer
    )  # fmt: skip


@dataclass
class RouterSums:
    """Sums over a layer's router inputs x, every domain counting the same: all that `hidden_mean` and `ridge` need."""

    gram_DD: Tensor
    """Σ w x xᵀ, float32."""
    cross_ED: Tensor
    """Σ w y xᵀ, y the targets: 1 for the domain's own expert, 0 for the others."""

    @classmethod
    def zeros(cls, hidden_size: int, num_experts: int) -> RouterSums:
        """No text seen yet."""
        return cls(torch.zeros(hidden_size, hidden_size), torch.zeros(num_experts, hidden_size))

    def add(self, x_TD: Tensor, y_TE: Tensor, weight: float) -> None:
        """Take some tokens in, each counting `weight`."""
        x_TD = x_TD.float()
        self.gram_DD += weight * (x_TD.T @ x_TD)
        self.cross_ED += weight * (y_TE.to(x_TD.dtype).T @ x_TD)


def ridge(sums: RouterSums, *, ridge: float, scale: float) -> Tensor:
    """scale · YᵀX (XᵀX + λI)⁻¹, (E, D): the linear map that comes nearest to the domain labels, λ relative to XᵀX.

    With labels 0 and 1 its outputs are about that far apart, which softmax would make almost equal gates: hence the
    scale. Solved in float64.

    Source: DUME, arXiv 2603.29765, closed form of ridge regression.
    """
    gram_DD = sums.gram_DD.double()
    regularised = gram_DD + ridge * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=torch.float64)
    return scale * torch.linalg.solve(regularised, sums.cross_ED.double().T).T.float()


def hidden_mean(sums: RouterSums, *, scale: float) -> Tensor:
    """scale · (m_e - m) / ‖m_e - m‖, (E, D): m_e the mean router input on expert e's text, m the mean of these.

    What all domains share is left out: it would add the same to every logit. Rows have the same length, since without
    a bias a longer row would win everywhere.
    """
    means_ED = sums.cross_ED  # every domain's weights sum to the same, so these are the means up to one factor
    directions_ED = means_ED - means_ED.mean(dim=0)
    return scale * directions_ED / directions_ED.norm(dim=1, keepdim=True).clamp(min=1e-12)
