"""What each expert is used for: the tokens it gets more often than an even load would say, and their classes.

Shape letters: T text tokens, K experts a token, E experts, V vocabulary, C token classes, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from btx.evaluation.token_classes import CLASSES, texts_of_vocabulary, token_class
from btx.moe.routers import Routing
from btx.reporting.shapes import UsedFor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 12
"""Tokens shown of an expert."""
LEAST = 10
"""Occurrences below which a token says nothing of an expert."""
LEAST_SHARE = 1 / 2000
"""Of all tokens: in a long text a token has to occur more often."""


class TokenTotals:
    """Sums over text tokens and layers: how often each token of the vocabulary went to each expert."""

    def __init__(self, vocabulary: int, num_experts: int) -> None:
        self.layers = 0
        self.count_V = torch.zeros(vocabulary, dtype=torch.int64)
        self.rows_VE = torch.zeros(vocabulary, num_experts, dtype=torch.int32)

    def add(self, routings_L: Sequence[Routing], ids_T: Tensor, mask_T: Tensor) -> None:
        """Count the tokens `ids_T` where `mask_T` is True."""
        V, E = self.rows_VE.shape
        ids_T = ids_T[mask_T]
        self.layers = len(routings_L)
        self.count_V += ids_T.bincount(minlength=V)
        for routing in routings_L:
            rows = (ids_T[:, None] * E + routing.expert_ids_TK.cpu()[mask_T]).flatten()
            self.rows_VE.view(-1).scatter_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))

    def used_for(self, tokenizer: PreTrainedTokenizerBase, experts: Sequence[str]) -> dict[str, UsedFor]:
        """What every expert is used for; its tokens with the largest share first.

        Raises:
            ValueError: nothing was counted.
        """
        total, E = float(self.count_V.sum()), len(experts)
        if not total:
            raise ValueError("no token was counted")
        there = self.count_V.nonzero().flatten()
        texts = texts_of_vocabulary(tokenizer, there.tolist())
        rows_NE, count_N = self.rows_VE[there].double(), self.count_V[there]
        share_NE, even = rows_NE / (count_N[:, None] * self.layers), float(rows_NE.sum()) / (total * self.layers * E)
        class_N = torch.tensor([CLASSES.index(token_class(text)) for text in texts])
        class_CE = torch.zeros(len(CLASSES), E, dtype=torch.float64).index_add_(0, class_N, rows_NE)
        class_CE /= class_CE.sum(dim=0).clamp(min=1)
        often_N = count_N >= max(LEAST, LEAST_SHARE * total)
        uses: dict[str, UsedFor] = {}
        for e, expert in enumerate(experts):
            wanted = (often_N & (share_NE[:, e] > even)).nonzero().flatten().tolist()
            wanted.sort(key=lambda n: (-round(float(share_NE[n, e]), 4), -float(count_N[n]), n))
            uses[expert] = {
                "tokens": [[texts[n], round(float(share_NE[n, e]), 4), int(count_N[n])] for n in wanted[:SHOWN]],
                "classes": {name: round(float(class_CE[c, e]), 4) for c, name in enumerate(CLASSES)},
            }
        return uses
