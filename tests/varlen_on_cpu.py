"""A CPU twin of the kernel behind torch's `varlen_attn`: plain attention, document by document.

It is registered beneath torch's own operator, so tests on a CPU go through all that a GPU goes through: the public
function, its shapes under torch.compile, its autograd. Both operators' first arguments are the same from torch 2.11 on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def documents(borders: Tensor) -> Iterator[slice]:
    """Tokens of each document that is not empty."""
    places = borders.tolist()
    for begin, end in pairwise(places):
        if begin < end:
            yield slice(begin, end)


def weights(query_THD: Tensor, key_TGD: Tensor, scale: float | None, window: Any) -> tuple[Tensor, Tensor]:
    """Attention weights (G, H/G, T, T) of one document, and the logarithms of their sums; G key heads."""
    T, H, D = query_THD.shape
    G = key_TGD.shape[1]
    query_GKTD = query_THD.view(T, G, H // G, D).permute(1, 2, 0, 3)
    scores = query_GKTD @ key_TGD.permute(1, 2, 0)[:, None] * (D**-0.5 if scale is None else scale)
    ahead_TT = torch.arange(T)[None] - torch.arange(T)[:, None]  # how far a key lies ahead of a query
    assert list(window)[1] == 0, "causal, or causal with a window"
    hidden_TT = ahead_TT > 0
    if window[0] >= 0:
        hidden_TT |= ahead_TT < -window[0]
    scores = scores.masked_fill(hidden_TT, -torch.inf)
    return scores.softmax(dim=-1), scores.logsumexp(dim=-1)


def forward(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, key_borders: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, scale: float | None = None, window: Any = None, *versions: Any, **more: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (T, H, D), logarithms (H, T), state of no random numbers."""
    assert borders[[0, -1]].tolist() == [0, len(query)], "a border is missing"
    assert torch.equal(borders, key_borders)
    assert int(borders.diff().max()) <= min(max_q, max_k)
    assert is_causal == (tuple(window) == (-1, 0))
    out, log_sums = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    for at in documents(borders):
        weights_GKTT, log_sums_GKT = weights(query[at], key[at], scale, window)
        out_GKTD = weights_GKTT @ value[at].transpose(0, 1)[:, None]
        out[at] = out_GKTD.flatten(0, 1).transpose(0, 1)
        log_sums[:, at] = log_sums_GKT.flatten(0, 1)
    return out, log_sums, torch.zeros(2, dtype=torch.uint64)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, borders: Tensor,
    key_borders: Tensor, max_q: int, max_k: int, is_causal: bool, random: Tensor, scale: float | None = None,
    window: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value."""
    grads = tuple(torch.empty_like(heads) for heads in (query, key, value))
    for at in documents(borders):
        q, k, v = query[at], key[at], value[at]
        (T, H, D), G = q.shape, k.shape[1]
        weights_GKTT, _ = weights(q, k, scale, window)
        grad_GKTD = grad[at].view(T, G, H // G, D).permute(1, 2, 0, 3)
        grad_weights = grad_GKTD @ v.permute(1, 2, 0)[:, None]
        grad_scores = weights_GKTT * (grad_weights - (grad_weights * weights_GKTT).sum(dim=-1, keepdim=True))
        grad_scores = grad_scores * (D**-0.5 if scale is None else scale)
        query_GKTD = q.view(T, G, H // G, D).permute(1, 2, 0, 3)
        grads[0][at] = (grad_scores @ k.transpose(0, 1)[:, None]).flatten(0, 1).transpose(0, 1)
        grads[1][at] = (grad_scores.mT @ query_GKTD).sum(dim=1).transpose(0, 1)
        grads[2][at] = (weights_GKTT.mT @ grad_GKTD).sum(dim=1).transpose(0, 1)
    return grads


@cache
def register() -> None:
    """Let torch's operators run on a CPU, in this process."""
    from torch.nn.attention import varlen

    varlen._varlen_attn.register_kernel("cpu", forward)
    varlen._varlen_attn_backward.register_kernel("cpu", backward)
