"""Rows to their experts and back: every way against a slow float64 reference, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from btx.moe import dispatch
from btx.moe.dispatch import cut_into_tiles, feed_forward, grouped_feed_forward, sort_by_expert

T, D, WIDTH, E = 50, 16, 24, 4


def inputs(K: int, dtype: torch.dtype = torch.float64, rng_seed: int = 0) -> tuple[Tensor, ...]:
    """x, gates, ids (expert 2 unused while K < E), gate_up, down."""
    generator = torch.Generator().manual_seed(rng_seed)
    x, gates, gate_up, down = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in ((T, D), (T, K), (E, 2 * WIDTH, D), (E, D, WIDTH))
    )
    logits = torch.rand(T, E, generator=generator)
    if K < E:
        logits[:, 2] = -1
    return x, gates, logits.topk(K).indices, gate_up, down


def reference(
    x: Tensor, gates: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, kept: Tensor | None = None, act=F.silu
) -> Tensor:
    rows = []
    for t in range(len(x)):
        row = torch.zeros(x.shape[1], dtype=x.dtype)
        for k, e in enumerate(ids[t].tolist()):
            if kept is None or kept[t, k]:
                gate, up = (gate_up[e] @ x[t]).chunk(2)
                row = row + gates[t, k] * (down[e] @ (act(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def gradients(y: Tensor, *of: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return list(torch.autograd.grad((y * weights).sum(), of))


@pytest.mark.parametrize("rows", [7, 30, 1000])
@pytest.mark.parametrize("K", [1, 2, E])
def test_values_and_gradients_equal_the_slow_reference(monkeypatch: pytest.MonkeyPatch, K: int, rows: int) -> None:
    monkeypatch.setattr(dispatch, "tile_rows", lambda width: rows)
    x, gates, ids, gate_up, down = inputs(K)
    found, wanted = feed_forward(x, gates, ids, gate_up, down, F.silu), reference(x, gates, ids, gate_up, down)
    assert torch.allclose(found, wanted, atol=1e-12)
    for a, b in zip(gradients(found, x, gates, gate_up, down), gradients(wanted, x, gates, gate_up, down), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("act", [F.gelu, torch.nn.SiLU(), torch.tanh])
def test_any_elementwise_activation_works(act) -> None:
    x, gates, ids, gate_up, down = inputs(2)
    found, wanted = feed_forward(x, gates, ids, gate_up, down, act), reference(x, gates, ids, gate_up, down, act=act)
    assert torch.allclose(found, wanted, atol=1e-12)
    for a, b in zip(gradients(found, x, gate_up), gradients(wanted, x, gate_up), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_dropped_rows_give_nothing_and_get_no_gradient() -> None:
    x, gates, ids, gate_up, down = inputs(2)
    kept = torch.rand(T, 2, generator=torch.Generator().manual_seed(5)) < 0.6
    kept[:3] = False
    found = feed_forward(x, gates * kept, ids, gate_up, down, F.silu, kept)
    wanted = reference(x, gates, ids, gate_up, down, kept)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert torch.equal(found[:3], torch.zeros_like(found[:3]))
    for a, b in zip(gradients(found, x, gates, gate_up, down), gradients(wanted, x, gates, gate_up, down), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_an_expert_without_rows_gets_a_gradient_of_exactly_zero() -> None:
    x, gates, ids, gate_up, down = inputs(2)
    for gradient in gradients(feed_forward(x, gates, ids, gate_up, down, F.silu), gate_up, down):
        assert torch.equal(gradient[2], torch.zeros_like(gradient[2]))
        assert (gradient[[0, 1, 3]].flatten(1).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("frozen", ["x", "gates", "experts"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: str) -> None:
    x, gates, ids, gate_up, down = inputs(2)
    trained = {"x": [gates, gate_up, down], "gates": [x, gate_up, down], "experts": [x, gates]}[frozen]
    wanted = gradients(feed_forward(x, gates, ids, gate_up, down, F.silu), *trained)
    for tensor in (x, gates, gate_up, down):
        tensor.requires_grad_(any(tensor is other for other in trained))
    found = feed_forward(x, gates, ids, gate_up, down, F.silu)
    for a, b in zip(gradients(found, *trained), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tokens", [0, 5])
def test_without_any_row_the_output_and_all_gradients_are_zero(tokens: int) -> None:
    x, gates, ids, gate_up, down = inputs(2)
    x, gates = (tensor.detach()[:tokens].requires_grad_() for tensor in (x, gates))
    kept = torch.zeros(tokens, 2, dtype=torch.bool)
    found = feed_forward(x, gates * kept, ids[:tokens], gate_up, down, F.silu, kept)
    assert torch.equal(found, torch.zeros(tokens, D, dtype=torch.float64))
    for gradient in torch.autograd.grad(found.sum(), (x, gate_up, down)):
        assert not gradient.any()


def test_inference_gives_the_same_values_as_training() -> None:
    x, gates, ids, gate_up, down = inputs(2, torch.float32)
    trained = feed_forward(x, gates, ids, gate_up, down, F.silu)
    with torch.no_grad():
        assert torch.equal(feed_forward(x, gates, ids, gate_up, down, F.silu), trained)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_grouped_product_equals_the_loop(dtype: torch.dtype, tolerance: float) -> None:
    x, gates, ids, gate_up, down = inputs(2, dtype)
    gates32 = gates.detach().float().requires_grad_()
    grouped = grouped_feed_forward(x, gates32, ids, gate_up, down, F.silu)
    looped = feed_forward(x, gates32, ids, gate_up, down, F.silu)
    assert grouped.dtype == looped.dtype == dtype
    scale = looped.abs().max()
    assert (grouped - looped).abs().max() <= tolerance * scale
    of = (x, gates32, gate_up, down)
    for a, b in zip(gradients(grouped, *of), gradients(looped, *of), strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    assert torch.equal(gradients(grouped_feed_forward(x, gates32, ids, gate_up, down, F.silu), down)[0][2],
                       torch.zeros_like(down[2]))  # fmt: skip


def test_under_autocast_products_are_bfloat16_and_gradients_float32() -> None:
    x, gates, ids, gate_up, down = inputs(2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = feed_forward(x, gates, ids, gate_up, down, F.silu)
    exact = feed_forward(x, gates, ids, gate_up, down, F.silu)
    assert found.dtype == torch.bfloat16
    assert 0 < (found - exact).abs().max() < 0.05 * exact.abs().max()
    for a, b in zip(gradients(found, x, gates, gate_up), gradients(exact, x, gates, gate_up), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 0.05 * b.abs().max()


def test_tiles_cover_all_rows_once_join_small_experts_and_cut_large_ones() -> None:
    tiles = cut_into_tiles([3, 0, 4, 25, 2, 8], 10)
    found = [
        [(piece.expert, piece.rows.stop - piece.rows.start, piece.first) for piece in tile.pieces] for tile in tiles
    ]
    assert found == [
        [(0, 3, True), (2, 4, True)], [(3, 8, True)], [(3, 8, False)], [(3, 9, False)], [(4, 2, True), (5, 8, True)],
    ]  # fmt: skip
    assert [row for tile in tiles for row in range(tile.rows.start, tile.rows.stop)] == list(range(42))
    for tile in tiles:
        assert [row for piece in tile.pieces for row in range(piece.rows.start, piece.rows.stop)] == (
            list(range(tile.rows.start, tile.rows.stop))
        )
        assert all(piece.local.start == piece.rows.start - tile.rows.start for piece in tile.pieces)


def test_rows_are_sorted_by_expert_and_tokens_stay_in_order() -> None:
    ids = torch.tensor([[2, 0], [0, 1], [2, 1]])
    order = sort_by_expert(ids, 4)
    assert order.rows_per_expert == [2, 2, 2, 0]
    assert order.token_R.tolist() == [0, 1, 1, 2, 0, 2]
    assert order.token_R[order.row_TK].tolist() == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_takes_the_grouped_product_with_the_same_results(dtype: torch.dtype) -> None:
    x, gates, ids, gate_up, down = (
        tensor.detach().cuda().requires_grad_(tensor.is_floating_point()) for tensor in inputs(2, dtype)
    )
    assert dispatch.can_group(x, down)
    found = feed_forward(x, gates.float(), ids, gate_up, down, F.silu).double().cpu()
    wanted = reference(*(t.detach().cpu() if not t.is_floating_point() else t.detach().double().cpu()
                         for t in (x, gates, ids, gate_up, down)))  # fmt: skip
    assert (found - wanted).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-2) * wanted.abs().max()
