"""The four routers against slow references and their limits, and what drops, samples and stays exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from btx.choices.routers import ROUTERS, RoutingRule
from btx.errors import CheckpointError
from btx.moe.routers import (
    LayerRule,
    Routing,
    biased_top_k_gates,
    place_in_queue,
    sample_temperature,
    sample_top1_gates,
    soft_gates,
    straight_through,
    switch_capacity,
    switch_gates,
    top_k_gates,
)


def logits(T: int = 200, E: int = 5, rng_seed: int = 0) -> Tensor:
    return torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(rng_seed)) * 2


def as_vectors(gates_TK: Tensor, ids_TK: Tensor, E: int) -> Tensor:
    return torch.zeros(len(ids_TK), E, dtype=gates_TK.dtype).scatter(1, ids_TK, gates_TK)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_top_k_is_softmax_then_select_then_renormalise(k: int) -> None:
    x = logits()
    gates, ids = top_k_gates(x, k)
    for row, chosen, values in zip(x.tolist(), ids.tolist(), gates.tolist(), strict=True):
        exps = [math.exp(value) for value in row]
        best = sorted(range(5), key=lambda e: -row[e])[:k]
        assert chosen == best
        assert values == pytest.approx([exps[e] / sum(exps[b] for b in best) for e in best], abs=1e-12)


def test_a_selection_bias_chooses_experts_and_is_in_no_gate() -> None:
    x, bias = logits().requires_grad_(), torch.tensor([0.3, -0.2, 0.0, 0.1, -0.3], dtype=torch.float64)
    gates, ids = biased_top_k_gates(x, 2, bias)
    probs = x.detach().softmax(dim=1)
    for row, chosen, values in zip(probs.tolist(), ids.tolist(), gates.tolist(), strict=True):
        best = sorted(range(5), key=lambda e: -(row[e] + bias[e].item()))[:2]
        assert chosen == sorted(best, key=lambda e: -row[e])
        assert values == pytest.approx([row[e] / sum(row[b] for b in best) for e in chosen], abs=1e-12)
    assert not torch.equal(ids, top_k_gates(x, 2)[1])
    assert all(torch.equal(a, b) for a, b in zip(biased_top_k_gates(x, 2, 0 * bias), top_k_gates(x, 2), strict=True))
    rule = LayerRule(RoutingRule("top_k"))
    trained, used = (rule(x, training=training, step=0, selection_bias_E=bias) for training in (True, False))
    assert torch.equal(trained.expert_ids_TK, ids)
    assert torch.equal(used.expert_ids_TK, top_k_gates(x, 2)[1])


def test_soft_is_the_full_softmax_and_top_k_with_all_experts() -> None:
    x = logits()
    assert torch.allclose(as_vectors(*soft_gates(x), 5), x.softmax(dim=1), atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(soft_gates(x), top_k_gates(x, 5), strict=True))


def test_switch_drops_the_later_tokens_of_a_full_expert_and_gates_by_probability() -> None:
    x, capacity = logits(), 30
    gates, ids, kept = switch_gates(x, capacity)
    taken = [0] * 5
    for row, (expert,), (gate,), (keeps,) in zip(x, ids.tolist(), gates.tolist(), kept.tolist(), strict=True):
        assert expert == int(row.argmax())
        assert keeps == (taken[expert] < capacity)
        assert gate == pytest.approx(float(row.softmax(0)[expert]) * keeps, abs=1e-12)
        taken[expert] += 1
    assert max(taken) > capacity
    assert int(kept.sum()) == sum(min(count, capacity) for count in taken)


def test_switch_capacity_is_a_multiple_of_an_equal_share() -> None:
    assert switch_capacity(100, 4, 1.5) == 38
    assert switch_capacity(1, 8, 1.5) == 1


def test_place_in_queue_counts_earlier_tokens_of_the_same_expert() -> None:
    assert place_in_queue(torch.tensor([2, 0, 2, 2, 0, 1]), 4).tolist() == [0, 0, 1, 2, 1, 0]


def test_the_switch_router_learns_through_its_gate() -> None:
    x = logits().requires_grad_()
    gates, _, _ = switch_gates(x, 30)
    gates.sum().backward()
    assert (x.grad.abs().sum(dim=1) > 0).sum() == (gates > 0).sum()


def test_the_sampling_temperature_falls_to_its_floor() -> None:
    assert sample_temperature(0, 0.5, 1e-4) == 1.0
    assert sample_temperature(1000, 0.5, 1e-4) == pytest.approx(math.exp(-0.1))
    assert sample_temperature(100_000, 0.5, 1e-4) == 0.5


def test_experts_are_sampled_with_their_softmax_probability() -> None:
    # The largest of logits + Gumbel noise falls on expert i with probability softmax_i, at any temperature.
    torch.manual_seed(0)
    x = torch.tensor([1.0, 0.0, -1.0, 2.0]).expand(40_000, 4)
    for temperature in (1.0, 0.5):
        _, ids = sample_top1_gates(x, temperature)
        share = ids.flatten().bincount(minlength=4) / len(x)
        assert torch.allclose(share, x[0].softmax(0), atol=0.01)


def test_a_sampled_gate_is_the_largest_value_of_the_tempered_softmax() -> None:
    x, temperature = logits(), 0.7
    torch.manual_seed(3)
    gates, ids = sample_top1_gates(x, temperature)
    torch.manual_seed(3)
    y = ((x - torch.empty_like(x).exponential_().log()) / temperature).softmax(dim=1)
    assert torch.allclose(as_vectors(gates, ids, 5), y * (y == y.max(dim=1, keepdim=True).values), atol=1e-12)


def test_sample_top1_is_hard_at_inference() -> None:
    x = logits()
    gates, ids = sample_top1_gates(x, None)
    assert torch.equal(gates, torch.ones_like(gates))
    assert torch.equal(ids[:, 0], x.argmax(dim=1))


@pytest.mark.parametrize("kind", ROUTERS)
def test_rules_route_as_their_settings_say(kind: str) -> None:
    torch.manual_seed(0)
    x = logits().float()
    settings = RoutingRule(kind, capacity_factor=0.5)
    for layer in (0, 1):
        for training in (True, False):
            routing = LayerRule(settings, layer)(x, training=training, step=10)
            k = {"top_k": 2, "switch": 1, "soft": 5, "sample_top1": 5 if layer == 0 else 1}[kind]
            assert routing.expert_ids_TK.shape == routing.gates_TK.shape == (200, k)
            assert (routing.kept_TK is not None) == (kind == "switch" and training)
            assert k == LayerRule(settings, layer).experts_per_token(5)


def test_sampling_depends_on_the_random_state_alone() -> None:
    rule, x = LayerRule(RoutingRule("sample_top1"), layer=1), logits().float()
    runs = []
    for rng_seed in (7, 7, 8):
        torch.manual_seed(rng_seed)
        runs.append(rule(x, training=True, step=5).expert_ids_TK)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_straight_through_has_sparse_values_and_the_full_softmax_gradient() -> None:
    x = logits().requires_grad_()
    routing = Routing(x, *top_k_gates(x, 2))
    gates_TE, ids_TE = straight_through(routing)
    assert torch.allclose(gates_TE, as_vectors(routing.gates_TK, routing.expert_ids_TK, 5), atol=1e-15)
    assert (gates_TE == 0).sum() == 200 * 3
    assert ids_TE[0].tolist() == [0, 1, 2, 3, 4]
    weights = torch.randn(5, dtype=torch.float64)
    (found,) = torch.autograd.grad((gates_TE * weights).sum(), x)
    (wanted,) = torch.autograd.grad((x.softmax(dim=1) * weights).sum(), x)
    assert torch.allclose(found, wanted, atol=1e-15)


@pytest.mark.parametrize(("settings", "plain", "k", "mean"), [
    (RoutingRule("top_k", top_k=3), True, 3, 3),
    (RoutingRule("soft"), True, 4, 4),
    (RoutingRule("switch"), False, 1, 1),
    (RoutingRule("sample_top1"), False, 1, 2.5),
    (RoutingRule("sample_top1", soft_first_layer=False), True, 1, 1),
])  # fmt: skip
def test_what_a_plain_class_expresses(settings: RoutingRule, plain: bool, k: int, mean: float) -> None:
    assert (settings.why_not_plain() is None) == plain
    assert settings.plain_top_k(4) == k
    assert settings.mean_experts_per_token(layers=2, num_experts=4) == mean
    assert RoutingRule.from_json(settings.as_json(), "btx.json") == settings


@pytest.mark.parametrize("broken", [
    {"kind": "other"}, {"kind": "switch", "capacity": 1.5}, {"kind": "switch", "capacity_factor": "1.5"}, [], None,
])  # fmt: skip
def test_a_broken_router_description_is_refused(broken: object) -> None:
    with pytest.raises(CheckpointError, match=r"x/btx\.json: router"):
        RoutingRule.from_json(broken, "x/btx.json")
