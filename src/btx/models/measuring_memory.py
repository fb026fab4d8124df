"""How much memory a model takes where it is measured: its weights, and what comes and goes in a forward pass.

No gradients, so nothing is kept from layer to layer but the stream, the routing of MoE layers and, where answers are
generated, keys and values. Counted tensor by tensor as in `btx.models.memory`; tests/test_placement.py compares with
the tensors that are alive in real forward passes.

Shape letters: T tokens of a forward pass, S sequence, D model, F feed-forward, V vocabulary, E experts, K experts a
token, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from btx.models.step_counts import FLOAT32, ModelShape

LOGITS_AT_ONCE = 2**25
"""Logits held in float32 at once: 128 MiB, whatever the vocabulary."""


@dataclass(frozen=True)
class Reading:
    """How a model reads what it is measured on."""

    tokens: int
    """T of a forward pass, at most."""
    cached_tokens: int = 0
    """Tokens whose keys and values are kept while answers are generated, at most."""


SCORING = Reading(8192)
"""Texts are scored: nothing is kept."""
ANSWERING = Reading(32_768, cached_tokens=32_768)
"""Questions are answered: prompt and new tokens of all that are answered at once."""
FITTING = Reading(16_384)
"""Routers are fitted on a GPU."""


def forward_bytes(shape: ModelShape, number: int, reading: Reading, *, dense_mask_of: int = 0) -> int:
    """What a forward pass takes at its peak besides weights and cache.

    Args:
        number: bytes of a number: 4 in float32, 2 in bfloat16.
        dense_mask_of: S of rows that attention reads with a mask of S x S; 0: document by document.
    """
    c, D, F, Q, K = number, shape.width, shape.feed_forward, shape.queries, shape.keys
    stream = c * (3 * D + 2 * Q // shape.heads)  # embeddings, a layer's input, the residual; rotations of a head
    norm = stream + 3 * FLOAT32 * D  # in float32: the input, its square, the normalised input
    masked = c * 2 * Q + (1 + c) * dense_mask_of if dense_mask_of else 0  # keys and values once a query head
    attention = stream + c * (Q + 2 * K) + max(c * (Q + K), masked + c * Q)  # rotated copies, or the output
    if shape.experts:
        rows = shape.experts_per_token
        feed_forward = stream + c * (D + rows * (2 * D + 3 * F)) + 3 * c * shape.shared_expert
    else:
        feed_forward = stream + c * (D + 3 * F)
    routing = shape.layers * (FLOAT32 * shape.experts + 12 * shape.experts_per_token) if shape.experts else 0
    logits = min(LOGITS_AT_ONCE, reading.tokens * shape.vocabulary) * (c * (c < FLOAT32) + 2 * FLOAT32)
    in_layer = reading.tokens * (max(norm, attention, feed_forward) + routing)
    return round(max(in_layer, reading.tokens * (2 * c * D + routing) + logits))


def cache_bytes(shape: ModelShape, number: int, reading: Reading) -> int:
    """Keys and values of all layers."""
    return reading.cached_tokens * shape.layers * 2 * shape.keys * number
