"""Losses on the routers against slow float64 references, transformers' own and the paper's limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from btx.moe.balancing import (
    Balancing,
    RoutingLoss,
    batch_means,
    load_balancing_loss,
    move_selection_bias,
    pooled_load_balancing_loss,
    router_z_loss,
    sparse_gates,
)
from btx.moe.routers import Routing, biased_top_k_gates, switch_gates, top_k_gates
from tests.processes import run_ranks

T, E = 60, 4


def routing(rng_seed: int, k: int = 2, dtype: torch.dtype = torch.float64, tokens: int = T) -> Routing:
    generator = torch.Generator().manual_seed(rng_seed)
    logits = (torch.randn(tokens, E, generator=generator, dtype=torch.float64) * 1.5).to(dtype).requires_grad_()
    return Routing(logits, *top_k_gates(logits, k))


def slow_loss(layer: Routing, mask: list[bool] | None = None) -> float:
    """N Σ_i u_i p_i, token by token in Python's float64."""
    used = [t for t in range(len(layer.logits_TE)) if mask is None or mask[t]]
    u, p = [0.0] * E, [0.0] * E
    for t in used:
        exps = [math.exp(value) for value in layer.logits_TE[t].tolist()]
        for i in range(E):
            p[i] += exps[i] / sum(exps) / len(used)
        for gate, expert in zip(layer.gates_TK[t].tolist(), layer.expert_ids_TK[t].tolist(), strict=True):
            u[expert] += gate / len(used)
    return E * sum(a * b for a, b in zip(u, p, strict=True))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_balancing_equals_the_slow_reference(k: int) -> None:
    layer, mask = routing(0, k), [t % 3 != 0 for t in range(T)]
    assert load_balancing_loss(layer).item() == pytest.approx(slow_loss(layer), abs=1e-12)
    assert load_balancing_loss(layer, torch.tensor(mask)).item() == pytest.approx(slow_loss(layer, mask), abs=1e-12)
    layers = [routing(seed, k) for seed in range(3)]
    total = RoutingLoss(Balancing(load_balancing=1.0)).add(layers, 1.0)
    assert total.item() == pytest.approx(sum(map(slow_loss, layers)), abs=1e-12)


def test_u_is_the_mean_of_the_sparse_gate_also_where_rows_are_dropped() -> None:
    logits = routing(0).logits_TE
    for layer in (routing(0), Routing(logits, *switch_gates(logits, 5))):
        assert torch.allclose(batch_means(layer)[0], sparse_gates(layer).mean(dim=0), atol=1e-15)


def test_the_loss_is_1_when_balanced_n_when_collapsed_and_half_n_on_two_experts() -> None:
    balanced = torch.eye(E, dtype=torch.float64).repeat(25, 1) * 60
    collapsed = torch.tensor([60.0, 0, 0, 0], dtype=torch.float64).expand(100, E)
    pair = torch.tensor([60.0, 60.0, 0, 0], dtype=torch.float64).expand(100, E)
    for logits, k, wanted in ((balanced, 1, 1.0), (collapsed, 1, E), (collapsed, 2, E), (pair, 2, E / 2)):
        assert load_balancing_loss(Routing(logits, *top_k_gates(logits, k))).item() == pytest.approx(wanted, abs=1e-9)


def test_the_pooled_loss_is_the_one_transformers_has() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [routing(seed, dtype=torch.float32) for seed in range(3)]
    theirs = load_balancing_loss_func(tuple(layer.logits_TE for layer in layers), E, 2)
    assert pooled_load_balancing_loss(layers).item() == pytest.approx(theirs.item(), abs=1e-6)


def test_the_z_loss_is_the_mean_square_of_the_log_normaliser() -> None:
    layer = routing(0)
    z = [math.log(sum(math.exp(value) for value in row)) ** 2 for row in layer.logits_TE.tolist()]
    assert router_z_loss(layer).item() == pytest.approx(sum(z) / T, abs=1e-12)


@pytest.mark.parametrize(("over_layers", "factor"), [("sum", 2.0), ("mean", 1.0)])
def test_layers_are_summed_or_averaged(over_layers: str, factor: float) -> None:
    layers = [routing(0), routing(1)]
    mean = sum(map(slow_loss, layers)) / 2
    loss = RoutingLoss(Balancing(0.01, over_layers=over_layers, router_z_loss=0.1))
    z = sum(router_z_loss(layer).item() for layer in layers) / 2
    assert loss.add(layers, share=0.5).item() == pytest.approx(0.5 * factor * (0.01 * mean + 0.1 * z), abs=1e-12)


def test_over_one_micro_batch_the_global_loss_is_the_micro_batch_loss() -> None:
    layers, other = [routing(0), routing(1)], [routing(0), routing(1)]
    micro = RoutingLoss(Balancing(1.0)).add(layers, share=1.0)
    whole = RoutingLoss(Balancing(1.0, over="global_batch")).add(other, share=1.0)
    assert whole.item() == pytest.approx(micro.item(), abs=1e-12)
    for a, b in zip(layers, other, strict=True):
        assert torch.allclose(*(torch.autograd.grad(loss, layer.logits_TE, retain_graph=True)[0]
                                for loss, layer in ((micro, a), (whole, b))), atol=1e-12)  # fmt: skip


def test_the_global_loss_is_that_of_all_micro_batches_together() -> None:
    parts = [routing(seed) for seed in range(3)]
    together = Routing(*(torch.cat([getattr(part, name) for part in parts])
                         for name in ("logits_TE", "gates_TK", "expert_ids_TK")))  # fmt: skip
    loss = RoutingLoss(Balancing(1.0, over="global_batch"))
    for part in parts:
        loss.add([part], share=1 / 3)
    assert loss.values()["load_balancing"].item() == pytest.approx(slow_loss(together), abs=1e-12)
    separate = RoutingLoss(Balancing(1.0))
    for part in parts:
        separate.add([part], share=1 / 3)
    assert separate.values()["load_balancing"].item() == pytest.approx(sum(map(slow_loss, parts)) / 3, abs=1e-12)


def test_selection_biases_move_by_the_sign_of_what_an_expert_lacks() -> None:
    biases = [torch.zeros(E), torch.full((E,), 0.5)]
    move_selection_bias(biases, torch.tensor([[10.0, 30.0, 20.0, 20.0], [0.0, 0.0, 0.0, 40.0]]), 0.001)
    assert biases[0].tolist() == pytest.approx([0.001, -0.001, 0, 0])
    assert biases[1].tolist() == pytest.approx([0.501, 0.501, 0.501, 0.499])


def test_selection_biases_even_out_the_loads_of_a_router_that_prefers_one_expert() -> None:
    logits = routing(0, tokens=400).logits_TE.detach() + torch.tensor([3.0, 0.0, 0.0, -3.0])
    bias = torch.zeros(E, dtype=torch.float64)

    def load() -> Tensor:
        return biased_top_k_gates(logits, 2, bias)[1].flatten().bincount(minlength=E) / 800

    assert load().max() - load().min() > 0.4
    for _ in range(200):
        move_selection_bias([bias], load()[None], 0.01)
    assert load().max() - load().min() < 0.05


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    part = routing(rank)
    loss = RoutingLoss(Balancing(1.0, over="global_batch"))
    value = loss.add([part], share=1.0)
    (gradient,) = torch.autograd.grad(value, part.logits_TE)
    reported = loss.values()["load_balancing"].double()
    torch.save([value.detach(), gradient, reported], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_see_the_loss_and_gradient_of_their_common_batch(tmp_path) -> None:
    run_ranks(_rank, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    parts = [routing(rank) for rank in range(2)]
    together = Routing(*(torch.cat([getattr(part, name) for part in parts])
                         for name in ("logits_TE", "gates_TK", "expert_ids_TK")))  # fmt: skip
    whole = load_balancing_loss(together)
    wanted: tuple[Tensor, ...] = torch.autograd.grad(whole, [part.logits_TE for part in parts])
    for (value, gradient, reported), gradient_wanted in zip(results, wanted, strict=True):
        assert value.item() == reported.item() == pytest.approx(whole.item(), abs=1e-12)
        assert torch.allclose(gradient / 2, gradient_wanted, atol=1e-12)  # DDP averages over the processes
