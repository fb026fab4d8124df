"""How fast the routing follows a change of domain inside a document.

Shape letters: K experts a token, L layers, P positions around the change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, permutations
from typing import TYPE_CHECKING

import numpy as np
import torch

from btx.data.held_out import HeldOutDocument, pack
from btx.data.token_files import DocumentEncoder
from btx.evaluation.mixed_set import JOINT, split_in_the_middle
from btx.evaluation.routed_text import routing_of
from btx.reporting.shapes import Lag

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DOCUMENTS = 48
"""Documents that change, at most."""
BEFORE, AFTER = 16, 64
"""Tokens around the change that are looked at, at most."""


@dataclass(frozen=True)
class Change:
    """A document that goes over from one domain to another."""

    tokens: np.ndarray
    """Token ids, the separator first."""
    at: int
    """Index of the first token of the new domain."""
    old: int
    """Index of the old domain's expert."""
    new: int


def changing_documents(
    texts: Mapping[int, Sequence[str]], tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Change]:
    """First halves of one expert's documents followed by second halves of another's, every ordered pair in turn.

    The halves are tokenized apart, so that no token lies across the change.

    Args:
        texts: index of a domain's own expert → documents of the domain; two experts at least.
    """
    encoder = DocumentEncoder(tokenizer)
    halves = {expert: cycle(map(split_in_the_middle, of_it)) for expert, of_it in texts.items()}
    changes = []
    for old, new in islice(cycle(permutations(texts, 2)), count):
        first = encoder.beginning(next(halves[old])[0] + JOINT)
        second = encoder.beginning(next(halves[new])[1])
        changes.append(Change(np.array([*first, *second[1:]], np.int64), len(first), old, new))
    return changes


def lag(model: PreTrainedModel, changes: Sequence[Change]) -> Lag:
    """Share of the load that the old and the new domain's expert take at each token around a change, mean over layers
    and documents. A position is left out if fewer than half of the documents have it."""
    sums_P2 = torch.zeros(BEFORE + AFTER, 2, dtype=torch.float64)
    count_P = torch.zeros(BEFORE + AFTER, dtype=torch.float64)
    for change in changes:
        first, end = max(1, change.at - BEFORE), min(len(change.tokens), change.at + AFTER)  # 0 is the separator
        # The bytes of a text count only where bits are counted by them.
        routings_L = routing_of(model, pack([HeldOutDocument(change.tokens, 0)], len(change.tokens)))
        place = first - change.at + BEFORE
        count_P[place : place + end - first] += 1
        for routing in routings_L:
            ids_PK = routing.expert_ids_TK[first:end].cpu()
            for column, expert in enumerate((change.old, change.new)):
                shares_P = (ids_PK == expert).double().mean(dim=1)
                sums_P2[place : place + end - first, column] += shares_P / len(routings_L)
    there_P = count_P >= len(changes) / 2
    shares_P2 = (sums_P2[there_P] / count_P[there_P, None]).tolist()
    return {
        "positions": [place - BEFORE for place in there_P.nonzero().flatten().tolist()],
        "old": [round(old, 4) for old, _ in shares_P2],
        "new": [round(new, 4) for _, new in shares_P2],
        "documents": len(changes),
    }
