"""Losses on the routers: load balancing (paper, section 3.2, equation of L_LB; after Switch Transformer, arXiv
2101.03961, eq. 4-6), the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5), and balancing without a loss (arXiv
2408.15664).

    L_LB = α N Σ_i u_i p_i,   per layer

u_i is the batch mean of the sparse gate g_i, p_i the batch mean of the full softmax. Where gates sum to 1 the value is
α when the experts are used equally and α·N when one takes everything. transformers' own loss counts selections
instead (K when balanced) and pools all layers before multiplying, which hides layers that collapsed in different ways.

Shape letters: T tokens, E experts, K experts a token, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, distributed

from btx.moe.routers import Routing
from btx.recipe.training import Finetune


@dataclass(frozen=True)
class Balancing:
    """Which losses on the routers are added to the next-token loss."""

    load_balancing: float = 0.0
    """Weight α of the load-balancing loss."""
    kind: Literal["paper", "pooled"] = "paper"
    """`paper`: per layer; `pooled`: transformers' loss, to compare with."""
    over_layers: Literal["sum", "mean"] = "sum"
    """How the layers' losses become one: the paper does not say."""
    over: Literal["micro_batch", "global_batch"] = "micro_batch"
    """The batch that the means u and p are taken over."""
    router_z_loss: float = 0.0
    """Weight of the router z-loss."""
    bias: float = 0.0
    """Step of the selection biases, in units of probability; 0: there are none."""

    @classmethod
    def of(cls, settings: Finetune) -> Balancing:
        """What a recipe says."""
        return cls(
            settings.load_balancing, settings.load_balancing_kind, settings.load_balancing_over_layers,
            settings.load_balancing_over, settings.router_z_loss, settings.load_balancing_bias,
        )  # fmt: skip


def sparse_gates(routing: Routing) -> Tensor:
    """The gate as a vector over all experts, zero where not selected: (T, E)."""
    zeros_TE = torch.zeros_like(routing.logits_TE)
    return zeros_TE.scatter(1, routing.expert_ids_TK, routing.gates_TK.to(zeros_TE.dtype))


def batch_means(routing: Routing, mask_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """u and p of the load-balancing loss, (E,) each: batch means of the sparse gate and of the full softmax.

    Args:
        mask_T: True for real tokens (T,); padding does not count. None: all are real.
    """
    (T, E), probs_TE, gates_TK = routing.logits_TE.shape, routing.logits_TE.softmax(dim=-1), routing.gates_TK
    share_T1 = None if mask_T is None else (mask_T.to(probs_TE.dtype) / mask_T.sum())[:, None]  # in a mean of real ones
    gates_TK = gates_TK / T if share_T1 is None else gates_TK * share_T1
    # Added up by expert: no (T, E) tensor of gates is made.
    u_E = probs_TE.new_zeros(E).index_add(0, routing.expert_ids_TK.flatten(), gates_TK.flatten().to(probs_TE.dtype))
    return u_E, probs_TE.mean(dim=0) if share_T1 is None else (probs_TE * share_T1).sum(dim=0)


def load_balancing_loss(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """L_LB / α of one layer.

    Args:
        routing: the layer's decisions for T tokens.
        mask_T: True for real tokens (T,); padding does not count. None: all are real.

    Returns:
        A scalar: 1 when balanced, E when collapsed onto one expert (where gates sum to 1).
    """
    u_E, p_E = batch_means(routing, mask_T)
    return len(u_E) * (u_E * p_E).sum()


def pooled_load_balancing_loss(routings: Sequence[Routing]) -> Tensor:
    """transformers' loss (`load_balancing_loss_func`), to compare with: selections instead of gates, all layers pooled.

    Returns:
        A scalar: K when balanced. Gradients reach p alone.
    """
    selected = [replace(routing, gates_TK=torch.ones_like(routing.gates_TK)) for routing in routings]
    counts_LE, p_LE = _means_of_layers(selected)
    return counts_LE.shape[1] * (counts_LE.mean(dim=0) * p_LE.mean(dim=0)).sum()


def _means_of_layers(routings: Sequence[Routing]) -> tuple[Tensor, Tensor]:
    """`batch_means` of all layers: (L, E) each."""
    means = [batch_means(routing) for routing in routings]
    return torch.stack([u_E for u_E, _ in means]), torch.stack([p_E for _, p_E in means])


def router_z_loss(routing: Routing) -> Tensor:
    """Mean over tokens of logsumexp(W x)²: keeps router logits small (arXiv 2202.08906, eq. 5)."""
    return routing.logits_TE.logsumexp(dim=-1).square().mean()


def routed_rows(routing: Routing) -> Tensor:
    """Rows that each expert takes, dropped ones left out: (E,), float32."""
    ids_TK = routing.expert_ids_TK
    counts_TK = torch.ones_like(ids_TK) if routing.kept_TK is None else routing.kept_TK
    # No bincount: on a GPU it waits for the largest id.
    zeros_E = routing.logits_TE.new_zeros(routing.logits_TE.shape[1], dtype=torch.float32)
    return zeros_E.index_add_(0, ids_TK.flatten(), counts_TK.flatten().float())


@torch.no_grad()
def move_selection_bias(biases_L: Sequence[Tensor], rows_LE: Tensor, step: float | Tensor) -> None:
    """After an optimiser step: b_i += step · sign(mean load - load_i), in every layer (arXiv 2408.15664, algorithm 1).

    Args:
        biases_L: the layers' selection biases (E,), changed in place.
        rows_LE: rows that each expert took in the step, on all processes.
        step: how far; 0 leaves them as they are.
    """
    for bias_E, rows_E in zip(biases_L, rows_LE, strict=True):
        bias_E += step * (rows_E.mean() - rows_E).sign()


class RoutingLoss:
    """The losses on the routers during one optimiser step, micro-batch by micro-batch.

    Over the global batch, a micro-batch sees the means of all micro-batches up to itself, on all processes: those
    before it as constants (the buffer of arXiv 2501.11873, section 3). With one micro-batch a step that is the loss
    of the whole batch, gradients included.
    """

    def __init__(self, settings: Balancing) -> None:
        self.settings = settings
        self.share = 0.0
        self.u_LE: Tensor | None = None
        """Σ share · u over the micro-batches so far, on all processes; p_LE the same."""
        self.p_LE: Tensor | None = None
        self.by_micro_batch: list[Tensor] = []

    def add(self, routings: Sequence[Routing], share: float) -> Tensor:
        """The loss to add to a micro-batch's, already weighted.

        Args:
            share: the micro-batch's share of the step's samples on this process.
        """
        u_LE, p_LE = _means_of_layers(routings)
        E = u_LE.shape[1]
        self._sum_up(u_LE.detach(), p_LE.detach(), share)
        per_layer_L = E * (u_LE * p_LE).sum(dim=1)
        self.by_micro_batch.append(per_layer_L.detach() * share)
        if self.settings.over == "global_batch":
            u, p = cast(Tensor, self.u_LE) / self.share, cast(Tensor, self.p_LE) / self.share
            # The value of all micro-batches so far, the gradient of this one's part in it.
            gradient_LE = (u_LE - u_LE.detach()) * p + u * (p_LE - p_LE.detach())
            per_layer_L = E * (u * p + gradient_LE).sum(dim=1)
        loss = self._over_layers(per_layer_L)
        if self.settings.kind == "pooled":
            loss = pooled_load_balancing_loss(routings)
        total = self.settings.load_balancing * loss
        if self.settings.router_z_loss:
            z_L = torch.stack([router_z_loss(routing) for routing in routings])
            total = total + self.settings.router_z_loss * self._over_layers(z_L)
        return total * share

    def _sum_up(self, u_LE: Tensor, p_LE: Tensor, share: float) -> None:
        pair = torch.stack([u_LE, p_LE]) * share
        if self.settings.over == "global_batch" and distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(pair)
            pair /= distributed.get_world_size()
        self.share += share
        self.u_LE = pair[0] if self.u_LE is None else self.u_LE + pair[0]
        self.p_LE = pair[1] if self.p_LE is None else self.p_LE + pair[1]

    def _over_layers(self, values_L: Tensor) -> Tensor:
        return values_L.sum() if self.settings.over_layers == "sum" else values_L.mean()

    def values(self) -> dict[str, Tensor]:
        """For metrics.jsonl, `load_balancing`: L_LB / α, mean over layers, of the batch the settings name; empty for a
        dense model. On the device."""
        if self.u_LE is None or self.p_LE is None:
            return {}
        if self.settings.over == "global_batch":
            u, p = self.u_LE / self.share, self.p_LE / self.share
            return {"load_balancing": u.shape[1] * (u * p).sum(dim=1).mean()}
        return {"load_balancing": torch.stack(self.by_micro_batch).sum(dim=0).mean()}
