"""The chunked next-token loss against torch's, and packing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from btx.data.mixture import NO_LABEL
from btx.models.loading import load_model
from btx.training import losses


@pytest.mark.parametrize("chunk", [7, 512])
def test_loss_and_gradients_equal_the_unchunked_ones(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(losses, "logit_rows", lambda vocabulary, on_gpu: chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).requires_grad_()
    labels = torch.randint(0, 50, (40,), generator=generator)
    labels[::5] = NO_LABEL
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum", ignore_index=NO_LABEL)
    wanted = torch.autograd.grad(expected * 3, (hidden, weight))
    found = losses.linear_cross_entropy(hidden, weight, labels)
    got = torch.autograd.grad(found * 3, (hidden, weight))
    assert torch.allclose(found, expected)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(10, 4)
    losses.linear_cross_entropy(hidden, weight, torch.arange(8)).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_packed_documents_do_not_see_each_other(make_llama: Callable[..., Path]) -> None:
    model = load_model(make_llama("llama"))
    first, second = torch.arange(5, 25), torch.arange(100, 130)
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    packed = model.base_model(torch.cat([first, second])[None], position_ids=positions, use_cache=False)
    alone = model.base_model(second[None], use_cache=False)
    assert torch.allclose(packed.last_hidden_state[0, 20:], alone.last_hidden_state[0], atol=1e-5)
    unpacked = model.base_model(torch.cat([first, second])[None], use_cache=False)
    assert not torch.allclose(unpacked.last_hidden_state[0, 20:], alone.last_hidden_state[0], atol=1e-2)
