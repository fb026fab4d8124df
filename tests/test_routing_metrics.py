"""What metrics.jsonl says of the routers, and the warning about dead experts."""

from __future__ import annotations

import pytest
import torch

from btx.choices.routers import RoutingRule
from btx.moe.routers import LayerRule, Routing, switch_gates, top_k_gates
from btx.moe.routing_metrics import WATCHED_STEPS, DeadExpertWatch, RoutingMeter


def logits(rng_seed: int = 0, T: int = 80) -> torch.Tensor:
    return torch.randn(T, 4, generator=torch.Generator().manual_seed(rng_seed))


def test_shares_and_entropy_are_those_of_all_micro_batches() -> None:
    parts = [logits(0, 80), logits(1, 40)]
    meter = RoutingMeter()
    for part in parts:
        meter.add([Routing(part, *top_k_gates(part, 2))])
    facts, whole = meter.facts(meter.values()), torch.cat(parts)
    counts = whole.topk(2).indices.flatten().bincount(minlength=4)
    assert facts["load"] == [pytest.approx((counts / 240).tolist(), abs=1e-4)]
    p = whole.softmax(dim=1)
    assert facts["router_entropy"] == [pytest.approx(-(p * p.log()).sum(dim=1).mean().item(), abs=1e-4)]
    assert facts["dropped"] == [0.0]


def test_dropped_rows_are_counted_and_are_no_load() -> None:
    x = logits()
    gates, ids, kept = switch_gates(x, 10)
    meter = RoutingMeter()
    meter.add([Routing(x, gates, ids, kept)])
    facts = meter.facts(meter.values())
    assert facts["dropped"] == [pytest.approx(1 - float(kept.float().mean()), abs=1e-4)]
    taken = ids[kept].bincount(minlength=4) / kept.sum()
    assert facts["load"] == [pytest.approx(taken.tolist(), abs=1e-4)]


def test_layers_may_use_different_numbers_of_experts() -> None:
    settings, x = RoutingRule("sample_top1"), logits()
    meter = RoutingMeter()
    meter.add([LayerRule(settings, layer)(x, training=True, step=0) for layer in range(2)])
    facts = meter.facts(meter.values())
    assert facts["load"][0] == [0.25] * 4
    assert sum(facts["load"][1]) == pytest.approx(1, abs=1e-3)


def test_a_dead_expert_is_told_once_by_name() -> None:
    lines: list[str] = []
    watch = DeadExpertWatch(["math", "code"], lines.append)
    alive, dying = [[0.5, 0.5], [0.4, 0.6]], [[0.5, 0.5], [0.0, 1.0]]
    for _ in range(WATCHED_STEPS):
        assert watch.see(alive) == []
    for _ in range(WATCHED_STEPS - 1):
        assert watch.see(dying) == []
    assert watch.see(dying) == watch.see(dying) == [[1, 0]]
    assert len(lines) == 1
    assert "expert math is dead in layer 1" in lines[0]
