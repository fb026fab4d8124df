"""What the MoE layers decide for a text, as numbers and token by token for showing.

Shape letters: T tokens, K top-k, L layers.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from btx.data.held_out import HeldOutDocument, Packed, held_out_documents, pack
from btx.data.token_texts import token_texts
from btx.models.packed import packed_hidden
from btx.moe.any_moe import watched
from btx.moe.routers import Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from btx.recipe.schema import Recipe

EXAMPLE_TOKENS = 200
"""Tokens shown of a document."""


def example_documents(run_folder: Path, recipe: Recipe, domain: str, count: int) -> list[HeldOutDocument]:
    """The starts of held-out documents that are shown token by token: `count`, or one more a source of the domain.

    They depend on nothing else: those of a smaller count are among those of a larger one.
    """
    documents = held_out_documents(run_folder, recipe, domain, sys.maxsize, documents=count) if count else []
    return [document.start(EXAMPLE_TOKENS) for document in documents]


def name_of(document: HeldOutDocument) -> str:
    """Name of a document, made from its tokens."""
    return hashlib.sha256(document.tokens.astype("<i8").tobytes()).hexdigest()[:12]


@torch.inference_mode()
def routing_of(model: PreTrainedModel, rows: Packed) -> list[Routing]:
    """What every MoE layer decides for the positions of `rows`, in row order."""
    with watched(model) as routings:
        packed_hidden(model, rows.input_ids_BS, rows.position_ids_BS)
    return routings


def token_by_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, shown_from: int = 1
) -> dict[str, Any]:
    """Tokens of one text: `tokens` (their texts), `experts` and `gates` (by layer, largest gate first).

    Args:
        tokens: token ids, the separator first; two at least.
        shown_from: index of the first token that is shown; those before it are context.
    """
    routings = routing_of(model, pack([HeldOutDocument(tokens, bytes=0)], len(tokens)))
    # Lists, not tensors: layers may differ in the number of experts a token uses.
    ids_LTK = [routing.expert_ids_TK[shown_from:].tolist() for routing in routings]
    gates_LTK = [routing.gates_TK[shown_from:].tolist() for routing in routings]
    return {
        "tokens": token_texts(tokenizer, tokens[shown_from:].tolist()),
        "experts": [list(ids_LK) for ids_LK in zip(*ids_LTK, strict=True)],
        "gates": [
            [[round(gate, 4) for gate in gates_K] for gates_K in gates_LK] for gates_LK in zip(*gates_LTK, strict=True)
        ],
    }
