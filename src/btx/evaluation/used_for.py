"""What each expert is used for: the tokens it gets more often than an even load would say, and their classes.

Shape letters: T text tokens, N different ones, K experts a token, E experts, V vocabulary, C token classes, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from btx.evaluation.routing_statistics import RoutedTokens
from btx.evaluation.token_classes import CLASSES, texts_of_vocabulary
from btx.reporting.shapes import UsedFor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 12
"""Tokens shown of an expert."""
LEAST = 10
"""Occurrences below which a token says nothing of an expert."""
LEAST_SHARE = 1 / 2000
"""Of all tokens: in a long text a token has to occur more often."""


def used_for(
    routed: RoutedTokens, tokenizer: PreTrainedTokenizerBase, experts: Sequence[str], class_V: np.ndarray
) -> dict[str, UsedFor]:
    """What every expert is used for; its tokens with the largest share first.

    Args:
        routed: text tokens of all domains, one at least.
        class_V: index in CLASSES of every token of the vocabulary.
    """
    there_N, place_T, count_N = np.unique(routed.token_T, return_inverse=True, return_counts=True)
    N, E, (T, L, _) = len(there_N), len(experts), routed.ids_TLK.shape
    rows_NE = np.zeros((N, E))
    for layer in range(L):
        ids_TK = routed.ids_TLK[:, layer]
        code = (place_T[:, None] * E + ids_TK)[ids_TK >= 0]
        rows_NE += np.bincount(code, minlength=N * E).reshape(N, E)
    share_NE, even = rows_NE / (count_N[:, None] * L), rows_NE.sum() / (T * L * E)
    class_CE = np.zeros((len(CLASSES), E))
    np.add.at(class_CE, class_V[there_N], rows_NE)
    class_CE /= class_CE.sum(axis=0).clip(min=1)
    often_N = count_N >= max(LEAST, LEAST_SHARE * T)
    uses: dict[str, UsedFor] = {}
    for e, expert in enumerate(experts):
        wanted = np.flatnonzero(often_N & (share_NE[:, e] > even)).tolist()
        wanted.sort(key=lambda n: (-round(float(share_NE[n, e]), 4), -int(count_N[n]), n))
        texts = texts_of_vocabulary(tokenizer, there_N[wanted[:SHOWN]].tolist())
        uses[expert] = {
            "tokens": [[text, round(float(share_NE[n, e]), 4), int(count_N[n])]
                       for text, n in zip(texts, wanted, strict=False)],
            "classes": {name: round(float(class_CE[c, e]), 4) for c, name in enumerate(CLASSES)},
        }  # fmt: skip
    return uses
