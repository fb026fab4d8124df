"""What a decoder layer keeps of a micro-batch for its backward pass, and what that takes besides: for
`btx.models.memory`.

Eagerly, as autograd keeps it operation by operation. Compiled, as torch's partitioner chooses: what products and
attention take and give is kept, once; norms, residual sums, activations and rotations are computed again
(tests/test_compiled_memory.py compares with what it chooses).

Shape letters: T tokens of a micro-batch, S sequence, D model, F feed-forward, E experts, K experts a token.
"""

from __future__ import annotations

from btx.models.step_counts import FLOAT32, MemoryScheme, MicroBatch, ModelShape
from btx.moe.dispatch import tile_rows


def kept_bytes(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> float:
    """Bytes a token that a layer keeps for its backward pass."""
    feed_forward = _moe_bytes(shape, scheme, batch) if shape.experts else _dense_bytes(shape, scheme, batch)
    return _norm_bytes(shape, scheme, batch) + _attention_bytes(shape, scheme, batch) + feed_forward


def _norm_bytes(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> float:
    """Both norms: their inputs, float32, and the normalised inputs. Compiled, the layer's input and the output of
    attention, of which all that is computed again."""
    if batch.compiled:
        return (FLOAT32 + scheme.arithmetic) * shape.width + 2 * FLOAT32
    return 2 * FLOAT32 * (1 + shape.trains("norms")) * shape.width


def _inputs(scheme: MemoryScheme, batch: MicroBatch, width: float, products: int) -> float:
    """The input of several products: autocast makes each a copy of its own, unless that is compiled."""
    return scheme.arithmetic * width * (products if scheme.casts and not batch.compiled else 1)


def _attention_bytes(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> float:
    """Queries, keys, values, output, the softmax's normalisers, and the mask as numbers to be added. Keys and values
    are there once a query head but in the GPU's kernel for documents; the CPU's blocks keep their outputs as well."""
    c, in_blocks = scheme.arithmetic, not (batch.on_gpu or batch.dense_mask)
    keys = shape.queries if batch.dense_mask or in_blocks else shape.keys
    count: float = c * ((2 + in_blocks) * shape.queries + 2 * keys) + FLOAT32 * shape.heads
    count += c * batch.sequence_length if batch.dense_mask else 0
    if shape.trains("attention"):
        count += _inputs(scheme, batch, shape.width, 3)
    if shape.head_norms:
        norms = c if batch.compiled else FLOAT32 + c * shape.trains("norms")
        count += norms * (shape.queries + shape.keys)
    return count


def _dense_bytes(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch, width: int | None = None) -> float:
    """Gate, up, the activated gate unless it is computed again, and their product, which only the down projection's
    gradient needs."""
    F, trains = shape.feed_forward if width is None else width, shape.trains("feed_forward")
    rows = scheme.arithmetic * F * (3 - batch.compiled + trains)
    return rows + _inputs(scheme, batch, shape.width, 2) * trains


def routing_bytes(shape: ModelShape) -> float:
    """Bytes a token of what a router has decided, which is there until the micro-batch's end: float32 logits and
    probabilities, gates, ids and the order of the rows."""
    return 16 * shape.experts + 32 * shape.experts_per_token if shape.experts else 0.0


def _moe_bytes(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> float:
    """Router and routed rows: K of them a token."""
    c, D, F, K = scheme.arithmetic, shape.width, shape.feed_forward, shape.experts_per_token
    router = shape.trains("routers") * c * D + routing_bytes(shape)
    shared = _dense_bytes(shape, scheme, batch, shape.shared_expert) if shape.shared_expert else 0.0
    if not batch.on_gpu:  # the input, and gate and up
        return router + shared + c * D * scheme.casts + 2 * c * F * K
    trains, computed_again = shape.trains("experts"), batch.compiled and scheme.casts
    return router + shared + c * K * (F * (3 - computed_again + trains) + D * (1 + trains))


def unused_in_first_layer(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> float:
    """What the first layer does not keep where nothing below its feed-forward sublayer trains."""
    if any(shape.trains(part) for part in ("embedding", "attention", "norms")):
        return 0.0
    return _norm_bytes(shape, scheme, batch) + _attention_bytes(shape, scheme, batch)


def backward_bytes(shape: ModelShape, scheme: MemoryScheme) -> float:
    """Bytes a token of gradients that are alive together in the backward pass of a layer: two of the stream, and what
    those of a dense sublayer are more than the activations that are gone by then."""
    dense = scheme.arithmetic * shape.feed_forward * (3 - shape.trains("feed_forward"))
    return 2 * FLOAT32 * shape.width + dense * (not shape.experts)


def expert_rows(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> float:
    """Gradients of routed rows: those of gate and up of all rows for the grouped product, a tile's with the loop over
    experts."""
    if not shape.experts:
        return 0.0
    rows, c, D, F = batch.tokens * shape.experts_per_token, scheme.arithmetic, shape.width, shape.feed_forward
    if batch.on_gpu:
        return c * rows * 2 * F
    return c * (rows * D + min(rows, tile_rows(F)) * (2 * D + 5 * F))
