"""Quality with some of the experts only: they are dropped one by one, and what is left reads the same text.

Shape letters: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from btx.data.held_out import HeldOutDocument, Packed, held_out_documents, shortened
from btx.evaluation.bits_per_byte import bits_per_byte
from btx.moe.any_moe import only_experts
from btx.number_texts import evenly
from btx.reporting.shapes import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from btx.recipe.schema import Recipe

TOKENS = 2_000
"""Tokens a domain that are enough for the curve."""
POINTS = 12
"""Points of the curve: of a model with more experts several are dropped at once."""


def documents_for_curve(
    run_folder: Path, recipe: Recipe, domain: str, tokenizer: PreTrainedTokenizerBase
) -> list[HeldOutDocument]:
    """Held-out documents of a domain for the curve: about TOKENS, longer ones cut."""
    documents = held_out_documents(run_folder, recipe, domain, TOKENS)
    return [shortened(document, TOKENS, tokenizer) for document in documents]


def kept_curve(
    model: PreTrainedModel, packed: Mapping[str, Packed], names: Sequence[str], order: Sequence[int]
) -> list[Kept]:
    """Bits per byte with all experts, then without the first of `order`, without the first two, ..., down to one.

    A dropped expert's router logit counts as -inf, in every layer; where fewer than K are left, a token uses those.

    Args:
        order: experts in the order in which they go, the least used first: all E of them.
    """
    curve: list[Kept] = []
    for dropped in evenly(len(order), POINTS):
        allowed_E = torch.ones(len(names), dtype=torch.bool)
        allowed_E[list(order[:dropped])] = False
        with only_experts(model, allowed_E if dropped else None):
            domains = {domain: bits_per_byte(model, rows).bits_per_byte for domain, rows in packed.items()}
        kept = [name for name, allowed in zip(names, allowed_E.tolist(), strict=True) if allowed]
        curve.append({"experts": kept, "domains": domains, "mean": sum(domains.values()) / len(domains)})
    return curve
