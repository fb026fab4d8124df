"""What the paper says about the router and load balancing (section 3.2), as tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from btx.moe.balancing import Balancing, RoutingLoss, load_balancing_loss
from btx.moe.routers import Routing, top_k_gates


def routing(logits_TE: Tensor, top_k: int) -> Routing:
    gates_TK, ids_TK = top_k_gates(logits_TE, top_k)
    return Routing(logits_TE, gates_TK, ids_TK)


def slow_load_balancing_loss(logits_TE: Tensor, top_k: int, mask_T: list[bool]) -> float:
    """L_LB / α token by token, in float64."""
    tokens = [row.double() for row, real in zip(logits_TE, mask_T, strict=True) if real]
    num_experts = logits_TE.shape[1]
    u, p = [0.0] * num_experts, [0.0] * num_experts
    for row in tokens:
        chosen = sorted(range(num_experts), key=lambda i: -float(row[i]))[:top_k]
        total = sum(float(row[i].exp()) for i in chosen)
        for i in chosen:
            u[i] += float(row[i].exp()) / total / len(tokens)
        everything = sum(float(value.exp()) for value in row)
        for i in range(num_experts):
            p[i] += float(row[i].exp()) / everything / len(tokens)
    return num_experts * sum(a * b for a, b in zip(u, p, strict=True))


def test_softmax_is_over_selected_logits_only() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -3.0]])
    gates, ids = top_k_gates(logits, 2)
    assert ids.tolist() == [[0, 1]]
    assert torch.allclose(gates, torch.tensor([2.0, 1.0]).softmax(0)[None])
    other = logits.clone()
    other[0, 3] = 0.9  # a loser's logit changes nothing
    assert torch.equal(top_k_gates(other, 2)[0], gates)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (8, 2), (5, 1), (4, 4)])
def test_selecting_then_softmax_equals_softmax_then_renormalising(experts: int, top_k: int) -> None:
    logits = torch.randn(100, experts, generator=torch.Generator().manual_seed(0))
    gates, ids = top_k_gates(logits, top_k)
    probs = logits.softmax(-1).gather(1, ids)
    assert torch.allclose(gates, probs / probs.sum(-1, keepdim=True), atol=2e-7)


@pytest.mark.parametrize("top_k", [1, 2])
def test_balanced_routing_has_loss_one(top_k: int) -> None:
    # Every expert is chosen equally often and the softmax is uniform on average.
    logits = torch.eye(4).repeat(25, 1) + torch.eye(4).roll(1, 0).repeat(25, 1) * 0.5
    assert float(load_balancing_loss(routing(logits, top_k))) == pytest.approx(1.0, abs=1e-6)


def test_collapse_has_loss_n() -> None:
    logits = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(64, 1)
    assert float(load_balancing_loss(routing(logits, 1))) == pytest.approx(4.0, abs=1e-5)


def test_a_layer_using_half_of_its_experts_has_loss_two() -> None:
    logits = torch.tensor([[50.0, 50.0, 0.0, 0.0]]).repeat(64, 1)
    assert float(load_balancing_loss(routing(logits, 2))) == pytest.approx(2.0, abs=1e-5)


def test_balancing_is_per_layer() -> None:
    # Four layers that each collapsed onto another pair look balanced when pooled, and are not.
    pairs = [(0, 1), (2, 3), (0, 2), (1, 3)]
    layers = []
    for pair in pairs:
        logits = torch.zeros(64, 4)
        logits[:, list(pair)] = 50.0
        layers.append(routing(logits, 2))
    assert float(RoutingLoss(Balancing(load_balancing=1.0)).add(layers, 1.0)) == pytest.approx(4 * 2.0, abs=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_loss_equals_a_slow_float64_reference_with_padding_masked(top_k: int) -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(top_k)) * 2
    mask = [i % 3 != 0 for i in range(50)]
    found = load_balancing_loss(routing(logits, top_k), torch.tensor(mask))
    assert float(found) == pytest.approx(slow_load_balancing_loss(logits, top_k, mask), rel=1e-5)


def test_padding_does_not_change_the_loss() -> None:
    real = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))
    padded = torch.cat([real, torch.full((20, 4), 9.0)])
    mask = torch.arange(60) < 40
    assert torch.allclose(load_balancing_loss(routing(padded, 2), mask), load_balancing_loss(routing(real, 2)))


def test_the_loss_pulls_routing_towards_balance() -> None:
    noise = torch.randn(256, 4, generator=torch.Generator().manual_seed(1))
    logits = (noise + torch.tensor([2.0, 0, 0, 0])).requires_grad_()
    loss = load_balancing_loss(routing(logits, 2))
    loss.backward()
    assert float(logits.grad[:, 0].mean()) > 0 > float(logits.grad[:, 1:].mean())
