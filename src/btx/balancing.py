"""Load balancing (paper, section 2.2, equation of L_LB; after Switch Transformer, arXiv 2101.03961, eq. 4-6).

    L_LB = α N Σ_i u_i p_i,   per layer

u_i is the batch mean of the sparse gate g_i, p_i the batch mean of the full softmax. The value is α when the experts
are used equally and α·N when one takes everything. transformers' own loss counts selections instead (K when balanced)
and pools all layers before multiplying, which hides layers that collapsed in different ways.

Shape letters: T tokens, E experts, K top-k, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from btx.moe import Routing


def sparse_gates(routing: Routing) -> Tensor:
    """The gate as a vector over all experts, zero where not selected: (T, E)."""
    zeros_TE = torch.zeros_like(routing.logits_TE)
    return zeros_TE.scatter(1, routing.expert_ids_TK, routing.gates_TK.to(zeros_TE.dtype))


def load_balancing_loss(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """L_LB / α of one layer.

    Args:
        routing: the layer's decisions for T tokens.
        mask_T: True for real tokens (T,); padding does not count. None: all are real.

    Returns:
        A scalar: 1 when balanced, E when collapsed onto one expert.
    """
    gates_TE, probs_TE = sparse_gates(routing), routing.logits_TE.softmax(dim=-1)
    if mask_T is None:
        u_E, p_E = gates_TE.mean(dim=0), probs_TE.mean(dim=0)
    else:
        share_T1 = (mask_T / mask_T.sum())[:, None]
        u_E, p_E = (gates_TE * share_T1).sum(dim=0), (probs_TE * share_T1).sum(dim=0)
    return len(u_E) * (u_E * p_E).sum()


def total_load_balancing_loss(routings: Sequence[Routing], mask_T: Tensor | None = None) -> Tensor:
    """Sum of `load_balancing_loss` over layers (the paper does not say whether it sums or averages)."""
    return torch.stack([load_balancing_loss(routing, mask_T) for routing in routings]).sum()


def expert_load(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Share of the routed rows each expert takes: (E,), sums to 1."""
    ids_TK = routing.expert_ids_TK if mask_T is None else routing.expert_ids_TK[mask_T.bool()]
    count_E = ids_TK.flatten().bincount(minlength=routing.logits_TE.shape[1]).float()
    return count_E / count_E.sum()
