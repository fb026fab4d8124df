"""The routers of the paper side by side (section 3.2 and its ablation): router logits → gate weights and expert ids.

    top_k        g = SoftMax(TopK(W x))
    soft         g = SoftMax(W x), all experts
    switch       one expert, g = its probability under SoftMax(W x); rows over the capacity are dropped
    sample_top1  one expert sampled by Gumbel-softmax; at inference the likeliest one, with gate 1

Each is a function of tensors; `LayerRule` takes the one that the model's rule names. Random numbers come from torch's
global generator, which training sets from (rng_seed, step) before every step: sampling resumes exactly.

Shape letters: T tokens, E experts, K experts a token, R = T·K routed rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from btx.choices.routers import RoutingRule


@dataclass(frozen=True)
class Routing:
    """What one MoE layer decided for a batch: what the load-balancing loss and the metrics are computed from."""

    logits_TE: Tensor
    """Router logits before the softmax, float32."""
    gates_TK: Tensor
    """Combine weights of the selected experts; 0 where a row was dropped."""
    expert_ids_TK: Tensor
    """Indices of the selected experts, largest gate first."""
    kept_TK: Tensor | None = None
    """False where a row was dropped; None if the router drops none."""


def top_k_gates(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """g = SoftMax(TopK(W x)): select first, then softmax over the selected logits only (paper, section 3.2).

    Args:
        logits_TE: router logits (T, E).
        top_k: number K of experts a token uses.

    Returns:
        gates_TK (T, K) in float32 (float64 for float64 logits), summing to 1, and expert_ids_TK (T, K).
    """
    selected_TK, expert_ids_TK = _at_least_float32(logits_TE).topk(top_k, dim=-1)
    return selected_TK.softmax(dim=-1), expert_ids_TK


def biased_top_k_gates(logits_TE: Tensor, top_k: int, bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """As `top_k_gates`, but the experts are those of TopK(SoftMax(W x) + b): b chooses, it is in no gate (balancing
    without a loss, arXiv 2408.15664, section 3).

    Args:
        bias_E: b, in units of probability.
    """
    logits_TE = _at_least_float32(logits_TE)
    expert_ids_TK = (logits_TE.detach().softmax(dim=-1) + bias_E).topk(top_k, dim=-1).indices
    selected_TK, order_TK = logits_TE.gather(1, expert_ids_TK).sort(dim=-1, descending=True)
    return selected_TK.softmax(dim=-1), expert_ids_TK.gather(1, order_TK)


def soft_gates(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """g = SoftMax(W x): every token uses all experts (paper, section 3.2). Equal to `top_k_gates` with K = E.

    Returns:
        gates_TE (T, E), largest first, and expert_ids_TE (T, E).
    """
    return top_k_gates(logits_TE, logits_TE.shape[-1])


def switch_gates(logits_TE: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """One expert a token, its gate is the probability SoftMax(W x)_e (Switch Transformer, arXiv 2101.03961, eq. 1-3).

    Args:
        capacity: rows an expert takes; later tokens that choose it too are dropped (their FF output is 0). None: all.

    Returns:
        gates_T1 with 0 for dropped tokens, expert_ids_T1, and kept_T1 (None without a capacity).
    """
    gates_T1, expert_ids_T1 = _at_least_float32(logits_TE).softmax(dim=-1).max(dim=-1, keepdim=True)
    if capacity is None:
        return gates_T1, expert_ids_T1, None
    kept_T1 = (place_in_queue(expert_ids_T1.squeeze(1), logits_TE.shape[1]) < capacity)[:, None]
    return gates_T1 * kept_T1, expert_ids_T1, kept_T1


def place_in_queue(expert_ids_T: Tensor, num_experts: int) -> Tensor:
    """How many earlier tokens chose the same expert: (T,), by one stable sort, without a (T, E) mask."""
    ids_T, order_T = expert_ids_T.sort(stable=True)
    first_E = torch.searchsorted(ids_T, torch.arange(num_experts, device=ids_T.device))
    places_T = torch.arange(len(ids_T), device=ids_T.device) - first_E[ids_T]
    return torch.empty_like(places_T).scatter_(0, order_T, places_T)


def switch_capacity(tokens: int, num_experts: int, capacity_factor: float) -> int:
    """Rows an expert takes: ⌈capacity_factor · T / E⌉ (arXiv 2101.03961, eq. 3)."""
    return math.ceil(capacity_factor * tokens / num_experts)


def sample_top1_gates(logits_TE: Tensor, temperature: float | None) -> tuple[Tensor, Tensor]:
    """Sample Top-1 (paper, section 3.2): y = SoftMax((W x + G) / τ), G Gumbel noise, all but its largest value zeroed.

    Args:
        temperature: τ; None at inference: the expert of the largest logit, gate 1.

    Returns:
        gates_T1, the largest value of y (so gradients reach all logits), and expert_ids_T1.
    """
    logits_TE = _at_least_float32(logits_TE)
    if temperature is None:
        expert_ids_T1 = logits_TE.argmax(dim=-1, keepdim=True)
        return torch.ones_like(expert_ids_T1, dtype=logits_TE.dtype), expert_ids_T1
    gumbel_TE = -torch.empty_like(logits_TE).exponential_().log()
    gates_T1, expert_ids_T1 = ((logits_TE + gumbel_TE) / temperature).softmax(dim=-1).max(dim=-1, keepdim=True)
    return gates_T1, expert_ids_T1


def sample_temperature(step: int, floor: float, rate: float) -> float:
    """τ = max(floor, exp(-rate · t)) after t optimiser steps (paper: floor 0.5, rate 1e-4)."""
    return max(floor, math.exp(-rate * step))


@dataclass(frozen=True)
class LayerRule:
    """How one layer routes: the model's rule, in its place in the model."""

    rule: RoutingRule
    layer: int = 0

    def __call__(
        self, logits_TE: Tensor, *, training: bool, step: int, selection_bias_E: Tensor | None = None
    ) -> Routing:
        """Route T tokens.

        Args:
            logits_TE: router logits (T, E), float32.
            training: sampling and dropping happen in training alone: at inference a token's output never depends on
                what else is in the batch.
            step: finished optimiser steps, for the temperature.
            selection_bias_E: steers which experts top_k chooses in training.
        """
        rule, (T, E) = self.rule, logits_TE.shape
        if self.experts_per_token(E) == E:
            return Routing(logits_TE, *soft_gates(logits_TE))
        if rule.kind == "switch":
            capacity = switch_capacity(T, E, rule.capacity_factor) if training else None
            return Routing(logits_TE, *switch_gates(logits_TE, capacity))
        if rule.kind == "sample_top1":
            temperature = sample_temperature(step, rule.temperature_floor, rule.temperature_rate) if training else None
            return Routing(logits_TE, *sample_top1_gates(logits_TE, temperature))
        if rule.kind != "top_k":
            raise KeyError(rule.kind)
        if training and selection_bias_E is not None:
            return Routing(logits_TE, *biased_top_k_gates(logits_TE, rule.top_k, selection_bias_E))
        return Routing(logits_TE, *top_k_gates(logits_TE, rule.top_k))

    def experts_per_token(self, num_experts: int) -> int:
        """K in this layer."""
        return self.rule.experts_per_token(self.layer, num_experts)


def straight_through(routing: Routing) -> tuple[Tensor, Tensor]:
    """Gates over all experts whose value is the sparse gate and whose gradient is that of the full softmax.

    With them every expert has to run on every token, and the router learns from the experts it did not choose too
    (DenseMixer: the straight-through estimator for TopK). Experts that were not chosen get exactly zero gradient.

    Returns:
        gates_TE (T, E) and expert_ids_TE (T, E).
    """
    probs_TE = routing.logits_TE.softmax(dim=-1)
    gates_TE = torch.zeros_like(probs_TE).scatter(1, routing.expert_ids_TK, routing.gates_TK.detach())
    ids_TE = torch.arange(probs_TE.shape[1], device=probs_TE.device).expand_as(probs_TE)
    return gates_TE + (probs_TE - probs_TE.detach()), ids_TE


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
