"""The MoE layer of the paper (section 3.2): a router and E feed-forward experts.

    FF_MoE(x) = Σ_i g_i(W x) FF_i(x),    g = SoftMax(TopK(W x)) or one of the other routers

Shape letters: B batch, S sequence, T = B·S tokens, D model, F feed-forward, E experts, K top-k.

`MoE` takes the place of transformers' own MoE block in memory. It holds the same parameters under the same names, so
`save_pretrained` of the surrounding model writes the plain class. How tokens are routed is in `btx.moe.routers`, how
they get to their experts and back in `btx.moe.dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btx.choices.routers import RoutingRule
from btx.errors import CheckpointError
from btx.moe.dispatch import feed_forward
from btx.moe.routers import LayerRule, Routing, straight_through


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

    def forward(self, x_TD: Tensor, gates_TK: Tensor, expert_ids_TK: Tensor, kept_TK: Tensor | None = None) -> Tensor:
        """Σ_k gates_TK[:, k] · FF_{expert_ids_TK[:, k]}(x_TD), (T, D), without the rows that `kept_TK` drops."""
        return feed_forward(x_TD, gates_TK, expert_ids_TK, self.gate_up_proj, self.down_proj, self.act_fn, kept_TK)


class MoE(nn.Module):
    """Mixture of experts, `FF_MoE`. After a forward pass `routing` holds that pass's decisions.

    Args:
        router: gives the logits.
        experts: the E feed-forward networks.
        rule: how logits become gates in this layer.
        router_name: name of the router in the plain class, under which its weight is saved; here it is `gate` always.
        shared_expert: an expert that every token uses, weighted by sigmoid(shared_expert_gate(x)), as in Qwen2-MoE.
    """

    def __init__(
        self, router: Router, experts: Experts, rule: LayerRule, *, router_name: str,
        shared_expert: tuple[nn.Module, nn.Module] | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.add_module(router_name, router)
        self.experts = experts
        if shared_expert is not None:
            self.shared_expert, self.shared_expert_gate = shared_expert
        self.rule = rule
        self.step = 0
        """Finished optimiser steps; Sample Top-1's temperature depends on it."""
        self.dense_router_gradient = False
        """In training run every expert on every token, so that the router's gradient knows them all."""
        self.routing: Routing | None = None
        self.keeps_routing = True
        """Whether a forward pass leaves its decisions in `routing`; see `routing_unchanged`."""
        self.allowed_E: Tensor | None = None
        """Experts that may be used, True or False; None: all. See `btx.moe.any_moe`."""
        self.selection_bias: Tensor | None
        # (E,), for balancing without a loss; in no saved model, for a plain class has nothing of the kind.
        self.register_buffer("selection_bias", None, persistent=False)

    def __getattr__(self, name: str) -> Any:
        if name == "gate" and "router" in self._modules:
            return self._modules["router"]
        return super().__getattr__(name)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        x_TD = x_BSD.flatten(0, 1)
        routing = self.route(x_TD)
        if torch.compiler.is_compiling() or self.keeps_routing:  # one graph for both: see btx.training.compiled
            self.routing = routing
        gates, ids, kept = routing.gates_TK, routing.expert_ids_TK, routing.kept_TK
        if self.dense_router_gradient and self.training:
            gates, ids = straight_through(routing)
        y_TD = cast(Tensor, self.experts(x_TD, gates, ids, kept))
        if "shared_expert" in self._modules:
            y_TD = y_TD + self.shared_expert_gate(x_TD).sigmoid() * self.shared_expert(x_TD)
        return y_TD.view_as(x_BSD)

    def route(self, x_TD: Tensor) -> Routing:
        """Which experts each of T tokens uses."""
        logits_TE = self.gate(x_TD).float()
        if self.allowed_E is not None:
            logits_TE = logits_TE.masked_fill(~self.allowed_E.to(logits_TE.device), -torch.inf)
        return self.rule(logits_TE, training=self.training, step=self.step, selection_bias_E=self.selection_bias)

    @property
    def num_experts(self) -> int:
        return self.gate.weight.shape[0]  # experts may be wrapped in an adapter


SHARED_EXPERT = ("shared_expert", "shared_expert_gate")
# Routers that were read and compared: softmax, K largest, normalised over them unless norm_topk_prob is false. A name
# like theirs is not enough: others of that name take sigmoids, add a bias or do not normalise.
KNOWN_ROUTERS = {
    f"{name}TopKRouter"
    for name in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Qwen3_5Moe", "Mellum", "FlexOlmo", "Olmoe", "GraniteMoe",
                 "GraniteMoeSWA", "Cohere2Moe")
}  # fmt: skip


def _rule_of(router: Any) -> LayerRule | None:
    """How a router of the plain class decides; None where `LayerRule` has nothing that is exactly the same."""
    if type(router).__name__ not in KNOWN_ROUTERS or list(router.state_dict()) != ["weight"]:
        return None
    if hasattr(router, "expert_selection_fn"):  # always normalised with softmax, whatever norm_topk_prob says
        return LayerRule(RoutingRule(top_k=router.top_k)) if router.expert_selection_fn == "softmax" else None
    if getattr(router, "norm_topk_prob", True):
        return LayerRule(RoutingRule(top_k=router.top_k))
    return LayerRule(RoutingRule("switch")) if router.top_k == 1 else None


def _router_of(block: nn.Module) -> nn.Module | None:
    """The router of a block with gated experts and perhaps one gated shared expert; None for any other block."""
    parts = dict(block.named_children())
    router = parts.pop("gate", None) or parts.pop("router", None)
    return router if parts.keys() in ({"experts"}, {"experts", *SHARED_EXPERT}) else None


def swap_in_moe(model: nn.Module) -> list[MoE]:
    """Put `MoE` in the place of every transformers MoE block of `model` that it computes exactly, sharing parameters.

    Any other block stays transformers' own.

    Returns:
        The new blocks in layer order, with the router of the model's config: Top-K, or Switch where K is 1 and gates
        are not normalised (its capacity is not in a plain config); an empty list for a dense model.
    """
    blocks = []
    places = [(module, place) for module in model.modules() for place in ("mlp", "block_sparse_moe")]
    for module, place in places:
        block = getattr(module, place, None)
        if not isinstance(block, nn.Module) or isinstance(block, MoE) or (router := _router_of(block)) is None:
            continue
        if (rule := _rule_of(router)) is None:
            continue
        parts = dict(block.named_children())
        old, gate = cast(Any, parts["experts"]), cast(Any, router)
        shared = (parts["shared_expert"], parts["shared_expert_gate"]) if "shared_expert" in parts else None
        moe = MoE(
            Router(gate.weight), Experts(old.gate_up_proj, old.down_proj, old.act_fn), rule,
            router_name="gate" if "gate" in parts else "router", shared_expert=shared,
        )  # fmt: skip
        for before, after in ((gate, moe.gate), (old, moe.experts)):
            _take_over_hook(before, after)
        setattr(module, place, moe)
        blocks.append(moe)
    if blocks and getattr(config := getattr(model, "config", None), "output_router_logits", False):
        # TRL leaves it on in what it saves; transformers' own balancing loss would look for logits of the old routers.
        cast(Any, config).output_router_logits = False
    return blocks


def _take_over_hook(before: nn.Module, after: nn.Module) -> None:
    """Give a module the accelerate hook of the one whose place it takes: it brings weights that lie elsewhere
    (`btx.models.placement`) and is kept in the module itself."""
    if (hook := getattr(before, "_hf_hook", None)) is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(after, hook)


def moe_blocks(model: nn.Module) -> list[MoE]:
    """The `MoE` blocks of `model` in layer order."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def set_router(model: nn.Module, rule: RoutingRule) -> None:
    """Let every MoE layer of `model` route by `rule`; blocks that are not btx's route by Top-K alone."""
    if not moe_blocks(model) and rule.kind != "top_k":
        raise CheckpointError(f"router {rule.kind}: the MoE blocks of {type(model).__name__} route by top_k alone")
    for layer, block in enumerate(moe_blocks(model)):
        block.rule = LayerRule(rule, layer)


def weight_parts(model: nn.Module) -> dict[str, str]:
    """Parameter name → `routers`, `experts` or `shared` (everything in a dense model)."""
    routers = {id(p) for block in moe_blocks(model) for p in block.gate.parameters()}
    experts = {id(p) for block in moe_blocks(model) for p in block.experts.parameters()}
    return {
        name: "routers" if id(p) in routers else "experts" if id(p) in experts else "shared"
        for name, p in model.named_parameters()
    }


def mean_experts_per_token(model: nn.Module) -> float | None:
    """Experts a token uses at inference, averaged over layers; None for a dense model."""
    blocks = moe_blocks(model)
    used = [block.rule.experts_per_token(block.num_experts) for block in blocks]
    return sum(used) / len(used) if used else None


def experts_run_in_training(model: nn.Module) -> float | None:
    """Experts that are computed for a token in training, averaged over layers: all with `dense_router_gradient`."""
    blocks = moe_blocks(model)
    if blocks and blocks[0].dense_router_gradient:
        return float(blocks[0].num_experts)
    return mean_experts_per_token(model)


def use_selection_bias(model: nn.Module) -> None:
    """Give every MoE layer a selection bias, zero at first; `btx.moe.balancing.move_selection_bias` moves it."""
    for block in moe_blocks(model):
        device = None if block.gate.weight.is_meta else block.gate.weight.device  # weights of a skeleton come later
        block.selection_bias = torch.zeros(block.num_experts, dtype=torch.float32, device=device)


@contextmanager
def routing_unchanged(blocks: Sequence[MoE]) -> Iterator[None]:
    """Within, forward passes leave `MoE.routing` alone: around a backward pass that recomputes activations. There each
    layer's routing would hold what its layer has recomputed, attention and all, until the next forward pass."""
    for block in blocks:
        block.keeps_routing = False
    try:
        yield
    finally:
        for block in blocks:
            block.keeps_routing = True


def at_step(blocks: Sequence[MoE], step: int) -> None:
    """Tell every MoE layer how many optimiser steps are finished."""
    for block in blocks:
        block.step = step
