"""How a new router starts: pure functions of tensors. What starts there are is in `btx.choices.router_inits`.

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

from btx.choices.router_inits import RouterInit


def random(num_experts: int, hidden_size: int, *, std: float, rng_seed: int, layer: int) -> Tensor:
    """N(0, std²) router weights (E, D), float32, from a generator of their own.

    Each layer has its own stream, so a layer's router does not depend on how many layers there are.
    """
    generator = torch.Generator().manual_seed(rng_seed * 1_000_003 + layer)
    return torch.randn(num_experts, hidden_size, generator=generator) * std


WITHOUT_TEXT: dict[str, Callable[[RouterInit, int, int, int], Tensor]] = {
    "random": lambda init, num_experts, hidden_size, layer: random(
        num_experts, hidden_size, std=init.std, rng_seed=init.rng_seed, layer=layer
    ),
    "zeros": lambda init, num_experts, hidden_size, layer: torch.zeros(num_experts, hidden_size),
}
"""Start that needs no text → (settings, E, D, layer) → router weight (E, D), float32."""


def initial_router(init: RouterInit, num_experts: int, hidden_size: int, layer: int) -> Tensor:
    """A layer's router weight (E, D), float32; zeros where text will decide."""
    return WITHOUT_TEXT["zeros" if init.needs_text else init.method](init, num_experts, hidden_size, layer)


@dataclass
class RouterSums:
    """Sums over a layer's router inputs x, every domain counting the same: all that `hidden_mean` and `ridge` need."""

    gram_DD: Tensor
    """Σ w x xᵀ, float32."""
    cross_ED: Tensor
    """Σ w y xᵀ, y the targets: 1 for the domain's own expert, 0 for the others."""

    @classmethod
    def zeros(cls, hidden_size: int, num_experts: int, device: torch.device | None = None) -> RouterSums:
        """No text seen yet."""
        return cls(
            torch.zeros(hidden_size, hidden_size, device=device), torch.zeros(num_experts, hidden_size, device=device)
        )

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
    identity_DD = torch.eye(len(gram_DD), dtype=torch.float64, device=gram_DD.device)
    regularised = gram_DD + ridge * gram_DD.diagonal().mean() * identity_DD
    return scale * torch.linalg.solve(regularised, sums.cross_ED.double().T).T.float()


def hidden_mean(sums: RouterSums, *, scale: float) -> Tensor:
    """scale · (m_e - m) / ‖m_e - m‖, (E, D): m_e the mean router input on expert e's text, m the mean of these.

    What all domains share is left out: it would add the same to every logit. Rows have the same length, since without
    a bias a longer row would win everywhere.
    """
    means_ED = sums.cross_ED  # every domain's weights sum to the same, so these are the means up to one factor
    directions_ED = means_ED - means_ED.mean(dim=0)
    return scale * directions_ED / directions_ED.norm(dim=1, keepdim=True).clamp(min=1e-12)


FROM_TEXT: dict[str, Callable[[RouterSums, RouterInit], Tensor]] = {
    "hidden_mean": lambda sums, init: hidden_mean(sums, scale=init.factor),
    "ridge": lambda sums, init: ridge(sums, ridge=init.ridge, scale=init.factor),
}
"""Start that needs text → (a layer's sums, settings) → router weight (E, D), float32."""
