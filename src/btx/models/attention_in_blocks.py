"""Attention of packed documents on a CPU: torch's own, over blocks that hold one document, or several short ones.

A mask over the whole row costs S x S, whatever it hides, and torch's kernel for CPUs skips nothing of it. A block costs
its own square only, and half of it where it is one document. Short documents that lie beside one another share a block
and a mask, for a call takes as long as some dozen tokens.

Shape letters: B batch, S sequence, T = B·S tokens, H query heads, G key heads, D head width, n tokens of a block.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

MOST_SHARED = 64
"""Tokens of documents that share a block."""


class Block(NamedTuple):
    """Tokens that see one another only."""

    tokens: int
    mask_nn: Tensor | None
    """Added to the scores: 0 where a token is seen, -inf elsewhere. None: each sees all up to itself."""


@torch.compiler.disable  # the blocks are other ones in every batch
def attend_in_blocks(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    borders_N: Tensor,
    row_tokens: int,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention within documents: (T, H, D).

    Args:
        borders_N: where documents begin, then T, repeated or not (`btx.models.packed.document_borders`).
        row_tokens: S: no block crosses the border of a row, so what a row gives does not depend on its batch.
        scale: of the scores; None: 1 / sqrt(D).
        window: tokens that a token sees, itself included; None: its document up to itself.
    """
    blocks = blocks_of(tuple(borders_N.tolist()), row_tokens, window, query_THD.dtype)
    heads_a_key = query_THD.shape[1] // key_TGD.shape[1]
    if heads_a_key > 1:  # without, torch would take no fused kernel
        key_TGD, value_TGD = (heads.repeat_interleave(heads_a_key, dim=1) for heads in (key_TGD, value_TGD))
    sizes = [block.tokens for block in blocks]
    parts = zip(blocks, *(heads.split(sizes) for heads in (query_THD, key_TGD, value_TGD)), strict=True)
    return torch.cat([_attend(block, query, key, value, scale) for block, query, key, value in parts])


def _attend(block: Block, query_nHD: Tensor, key_nHD: Tensor, value_nHD: Tensor, scale: float | None) -> Tensor:
    query, key, value = (heads.transpose(0, 1)[None] for heads in (query_nHD, key_nHD, value_nHD))
    out_HnD: Tensor = scaled_dot_product_attention(
        query, key, value, attn_mask=block.mask_nn, is_causal=block.mask_nn is None, scale=scale
    )[0]
    return out_HnD.transpose(0, 1)


@lru_cache(maxsize=4)  # all layers of a kind see the same batch
def blocks_of(borders: tuple[int, ...], row_tokens: int, window: int | None, dtype: torch.dtype) -> list[Block]:
    """The blocks of all rows, in order: each a document of more than 64 tokens, or neighbours of 64 together."""
    shared: list[list[int]] = []
    for begin, end in pairwise(borders):
        if begin == end:
            continue
        together = sum(shared[-1]) + end - begin if shared and begin % row_tokens else MOST_SHARED + 1
        if together <= MOST_SHARED:
            shared[-1].append(end - begin)
        else:
            shared.append([end - begin])
    return [Block(sum(lengths), _mask(lengths, window, dtype)) for lengths in shared]


@torch.inference_mode(False)  # a mask that was made while measuring may be met again in training
def _mask(lengths: list[int], window: int | None, dtype: torch.dtype) -> Tensor | None:
    if len(lengths) == 1 and (window is None or lengths[0] <= window):
        return None
    places_n = torch.arange(sum(lengths))
    document_n = torch.repeat_interleave(torch.tensor(lengths))
    ahead_nn = places_n[:, None] - places_n  # how far a query lies ahead of a key
    seen_nn = (document_n[:, None] == document_n) & (ahead_nn >= 0)
    if window is not None:
        seen_nn &= ahead_nn < window
    return torch.zeros(seen_nn.shape, dtype=dtype).masked_fill_(~seen_nn, -torch.inf)
