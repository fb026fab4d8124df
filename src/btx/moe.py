"""The MoE layer of the paper (section 2.2): a router and E feed-forward experts, Top-K, dropless.

    FF_MoE(x) = Σ_i g_i(W x) FF_i(x),    g = SoftMax(TopK(W x))

Shape letters: B batch, S sequence, T = B·S tokens, D model, F feed-forward, E experts, K top-k, R = T·K routed rows.

`MoE` takes the place of transformers' own MoE block in memory. It holds the same parameters under the same names, so
`save_pretrained` of the surrounding model writes the plain class, and any engine reads it without btx.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Routing:
    """What one MoE layer decided for a batch: what the load-balancing loss and the metrics are computed from."""

    logits_TE: Tensor
    """Router logits before the softmax, float32."""
    gates_TK: Tensor
    """Combine weights of the selected experts; they sum to 1."""
    expert_ids_TK: Tensor
    """Indices of the selected experts, largest gate first."""


def top_k_gates(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """g = SoftMax(TopK(W x)): select first, then softmax over the selected logits only (paper, section 2.2).

    Args:
        logits_TE: router logits (T, E).
        top_k: number K of experts a token uses.

    Returns:
        gates_TK (T, K) in float32, summing to 1, and expert_ids_TK (T, K).
    """
    selected_TK, expert_ids_TK = logits_TE.float().topk(top_k, dim=-1)
    return selected_TK.softmax(dim=-1), expert_ids_TK


class _Dispatch(torch.autograd.Function):
    """Rows for the experts: x_RD[r] = x_TD[token_R[r]]. The backward pass gathers too: faster than scattering."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        grad_TKD = grad[0].index_select(0, row_TK.flatten()).view(*row_TK.shape, -1)
        return grad_TKD.sum(dim=1), None, None


class _Combine(torch.autograd.Function):
    """The transpose of `_Dispatch`: y_TD[t] = Σ_k out_RD[row_TK[t, k]]."""

    @staticmethod
    def forward(ctx: Any, out_RD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        return out_RD.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        (token_R,) = ctx.saved_tensors
        return grad[0].index_select(0, token_R), None, None


class Router(nn.Module):
    """The linear router, one a layer: weight (E, D), no bias."""

    def __init__(self, weight_ED: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_ED

    def forward(self, x_TD: Tensor) -> Tensor:
        """Router logits (T, E)."""
        return F.linear(x_TD, self.weight)


class Experts(nn.Module):
    """E gated feed-forward networks: gate_up_proj (E, 2F, D) with the gate projection first, down_proj (E, D, F)."""

    def __init__(self, gate_up_proj: nn.Parameter, down_proj: nn.Parameter, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.act_fn = act_fn

    def forward(self, x_TD: Tensor, gates_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """Σ_k gates_TK[:, k] · FF_{expert_ids_TK[:, k]}(x_TD), (T, D).

        Routed rows are sorted by expert, so that every expert is two matrix products on contiguous rows. An expert
        without tokens costs nothing and gets a zero gradient.
        """
        (T, K), E = expert_ids_TK.shape, self.gate_up_proj.shape[0]
        slot_R = expert_ids_TK.flatten().argsort(stable=True)
        row_TK = torch.empty_like(slot_R).scatter_(0, slot_R, torch.arange(T * K, device=slot_R.device)).view(T, K)
        token_R = slot_R // K
        rows_per_expert = expert_ids_TK.flatten().bincount(minlength=E).tolist()
        x_RD = _Dispatch.apply(x_TD, token_R, row_TK)
        out = [
            self._feed_forward(x_rD, gate_up, down)
            for x_rD, gate_up, down in zip(
                x_RD.split(rows_per_expert), self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True
            )
            if len(x_rD)
        ]
        gates_R = gates_TK.flatten()[slot_R]
        out_RD = torch.cat(out) * gates_R[:, None].to(out[0].dtype)
        return cast(Tensor, _Combine.apply(out_RD, token_R, row_TK))

    def _feed_forward(self, x_RD: Tensor, gate_up_2FD: Tensor, down_DF: Tensor) -> Tensor:
        gate_RF, up_RF = F.linear(x_RD, gate_up_2FD).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate_RF) * up_RF, down_DF)


class MoE(nn.Module):
    """Top-K mixture of experts, `FF_MoE`. After a forward pass `routing` holds that pass's decisions."""

    def __init__(self, router: Router, experts: Experts, top_k: int) -> None:
        super().__init__()
        self.gate = router
        self.experts = experts
        self.top_k = top_k
        self.routing: Routing | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        x_TD = x_BSD.flatten(0, 1)
        logits_TE = self.gate(x_TD).float()
        gates_TK, expert_ids_TK = top_k_gates(logits_TE, self.top_k)
        self.routing = Routing(logits_TE, gates_TK, expert_ids_TK)
        return cast(Tensor, self.experts(x_TD, gates_TK, expert_ids_TK)).view_as(x_BSD)


def _is_plain(block: nn.Module) -> bool:
    """A block of a router and experts alone. One with shared experts or a selection bias stays transformers' own."""
    parts = dict(block.named_children())
    return parts.keys() == {"gate", "experts"} and [name for name, _ in parts["gate"].named_parameters()] == ["weight"]


def swap_in_moe(model: nn.Module) -> list[MoE]:
    """Put `MoE` in the place of every plain transformers MoE block of `model`, sharing its parameters.

    Returns:
        The new blocks in layer order; an empty list for a dense model.
    """
    blocks = []
    for module in list(model.modules()):
        block = getattr(module, "mlp", None)
        if not isinstance(block, nn.Module) or isinstance(block, MoE) or not _is_plain(block):
            continue
        old = cast(Any, block.experts)
        experts = Experts(old.gate_up_proj, old.down_proj, old.act_fn)
        gate = cast(Any, block.gate)
        moe = MoE(Router(gate.weight), experts, gate.top_k)
        module.mlp = moe
        blocks.append(moe)
    return blocks


def moe_blocks(model: nn.Module) -> list[MoE]:
    """The `MoE` blocks of `model` in layer order."""
    return [module for module in model.modules() if isinstance(module, MoE)]
