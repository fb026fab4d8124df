"""How much memory a training step holds at its peak, counted from the model's shape before anything is trained.

Counted is what `btx.training.step` does, tensor by tensor: weights, gradients and the optimiser's moments; what the
layers keep for the backward pass (`btx.models.layer_memory`); a chunk of logits with its gradient
(`btx.training.losses`); and the largest buffers that come and go. The peak is the largest of four moments: the loss at
the end of the forward pass, its backward pass, the backward pass of the last layer, and the end of all.
tests/test_memory.py compares with the tensors that are alive in real steps on a CPU, and with peaks measured on an
H100.

Not counted: what torch's allocator loses between its blocks, the CUDA context (about 0.5 GB), most kernels' own
buffers. Attention other than softmax attention is counted as if it were.

Shape letters: T tokens of a micro-batch, S sequence, D model, F feed-forward, V vocabulary, E experts, K experts a
token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from btx.models.layer_memory import backward_bytes, expert_rows, kept_bytes, routing_bytes, unused_in_first_layer
from btx.models.step_counts import CPU_ROWS, FLOAT32, MemoryScheme, MicroBatch, ModelShape

if TYPE_CHECKING:
    from collections.abc import Mapping

GPU_LOGITS = 2**28
"""Logits alive at a time on a GPU, 1 GiB in float32: every chunk reads and writes the (V, D) gradient of the head once,
which for Llama 3's vocabulary takes as long as its product does for 500 rows."""
GPU_WORKSPACES = 2 * 2**25
"""Bytes that cuBLAS holds on a Hopper GPU from its first product on, for each of the threads that compute: 32 MiB for
the forward and 32 MiB for the backward pass. On older GPUs it is 8 MiB each."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the layers keep for the backward pass, copies of weights in the arithmetic's type included."""
    logits: int
    """A chunk of logits with its gradient, and the LM head's gradient on its way."""
    workspace: int
    """Buffers that come and go with a layer's backward pass."""

    @property
    def peak(self) -> int:
        return sum(asdict(self).values())

    @property
    def state(self) -> int:
        """Weights, gradients and moments."""
        return self.weights + self.gradients + self.optimizer


def logit_rows(vocabulary: int, *, on_gpu: bool) -> int:
    """Rows of logits that the loss holds at a time: a multiple of 128."""
    return max(CPU_ROWS, GPU_LOGITS // vocabulary // 128 * 128) if on_gpu else CPU_ROWS


def training_memory(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> TrainingMemory:
    """The peak of a training step, by what takes it; of several processes, that of each.

    Each of P processes has 1/P of the float32 weights, gradients and moments, and besides, from the forward pass to the
    end of the backward pass, every layer's weights put together in the arithmetic's type: a whole copy.
    """
    P, trained = batch.processes, sum(shape.trained.values())
    held = _weights_of_each(shape, scheme, batch) if P > 1 else [(_weights(shape, scheme), 0.0)] * 4
    moments = [
        TrainingMemory(*map(round, (
            weights, there * FLOAT32 * trained / P, scheme.moments * trained / P, activations, logits,
            workspace + buffer,
        )))
        for (there, activations, logits, workspace), (weights, buffer) in
        zip(_moments(shape, scheme, batch), held, strict=True)
    ]  # fmt: skip
    return max(moments, key=lambda moment: moment.peak)


def _weights(shape: ModelShape, scheme: MemoryScheme) -> float:
    """All weights, in the types that the scheme says."""
    matrices = _held(shape.trained)
    frozen = _held(shape.total) - matrices
    others = sum(shape.total.values()) - matrices - frozen
    head = shape.vocabulary * shape.width * shape.tied * scheme.holds_copies
    weights = (scheme.weight + scheme.working) * matrices + scheme.frozen * frozen + FLOAT32 * others
    return weights + scheme.arithmetic * head


def _weights_of_each(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> list[tuple[float, float]]:
    """(weights, buffers of the reduction) of one of several processes, in the order of `_moments`."""
    c, P, trained = scheme.arithmetic, batch.processes, sum(shape.trained.values())
    root, root_trained = (sum(parts.get(part, 0) for part in ("embedding", "head")) for parts in
                          (shape.total, shape.trained))  # fmt: skip
    shares, layers = FLOAT32 * sum(shape.total.values()) / P, c * (sum(shape.total.values()) - root)
    together = FLOAT32 * root + c * shape.vocabulary * shape.width * (c < FLOAT32)  # the head in both types
    # A layer's gradients, whole, and in float32 those that are being added up over the processes.
    reduced = (c + FLOAT32) * (trained - root_trained) / shape.layers - _gradient_copy(shape, scheme, batch)
    whole = shares + layers + together
    at_end = shares + FLOAT32 * root, FLOAT32 * root_trained  # the layers' are gone
    return [(whole, 0.0), (whole, 0.0), (whole, reduced), at_end]


def _moments(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> list[tuple[int, float, float, float]]:
    """(gradients are there, activations, logits, workspace) of the moments in which a step may be at its peak."""
    T, D, c, before = batch.tokens, shape.width, scheme.arithmetic, 0 if batch.alone else 1
    top = T * D * (FLOAT32 * (1 + shape.trains("norms")) + c)  # the last norm's input, normalised, and what it gives
    layer, copies = T * kept_bytes(shape, scheme, batch), _weight_copies(shape, scheme)
    if batch.checkpointed:
        kept = _kept_once(shape, batch) + shape.layers * T * (D * FLOAT32 + routing_bytes(shape))
        by_autocast = _matrices(shape.trained) - shape.trained.get("experts", 0)  # which keeps the copies it has made
        at_end = kept + c * by_autocast * scheme.casts_trained
        in_backward, in_layer = kept, kept + layer + copies / shape.layers
    else:
        kept = _kept_once(shape, batch) + copies + shape.layers * layer
        kept -= T * unused_in_first_layer(shape, scheme, batch)
        at_end = in_backward = in_layer = kept
    head = shape.vocabulary * D if shape.head_trains else 0
    waiting = FLOAT32 * head * shape.tied  # the head's gradient, until the embedding's is there to be added to it
    at_loss = FLOAT32 * head + c * shape.vocabulary * D * scheme.casts_trained + T * D * c
    behind_loss = head * (2 * FLOAT32 + c * (c < FLOAT32)) + 2 * T * D * c
    gradients = T * backward_bytes(shape, scheme) + expert_rows(shape, scheme, batch)
    libraries = GPU_WORKSPACES * batch.on_gpu
    return [
        (before, at_end + top, at_loss + _logits_bytes(shape, scheme, batch), libraries),
        (before, in_backward + top, behind_loss, libraries),
        (before, in_layer, waiting, gradients + _gradient_copy(shape, scheme, batch) + libraries),
        (1, 0.0, waiting, FLOAT32 * shape.vocabulary * D * shape.trains("embedding") + libraries),
    ]


def _kept_once(shape: ModelShape, batch: MicroBatch) -> float:
    """What all layers share: the mask, bool, and the rotary embedding's sines and cosines."""
    mask = batch.tokens * batch.sequence_length * batch.dense_mask
    return mask + batch.tokens * 2 * FLOAT32 * shape.queries / shape.heads


def _logits_bytes(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> float:
    """The more of two: a chunk of logits with what its loss takes, or its gradient with its part in that of the head.

    The loss: logits in the arithmetic's type and in float32, and a second time in float32 inside their logsumexp.
    Compiled, the logsumexp takes nothing, and instead of it there is the gradient in the arithmetic's type.
    """
    c, logits = scheme.arithmetic, min(batch.logit_rows, batch.tokens) * shape.vocabulary
    in_loss = FLOAT32 + c * scheme.casts + (c if batch.compiled else FLOAT32)
    in_place = batch.on_gpu and scheme.casts
    of_head = c * shape.vocabulary * shape.width * shape.head_trains * (not in_place)
    return max(in_loss * logits, c * logits + of_head)


def _held(parameters: Mapping[str, int]) -> int:
    """Of parameters by part, those that a scheme may hold in another type than float32."""
    return sum(parameters.get(part, 0) for part in ("attention", "feed_forward", "experts", "head"))


def _matrices(parameters: Mapping[str, int]) -> int:
    """Of parameters by part, those of the layers' matrices."""
    return sum(parameters.get(part, 0) for part in ("attention", "feed_forward", "experts", "routers"))


def _weight_copies(shape: ModelShape, scheme: MemoryScheme) -> float:
    """All layers' matrices in the arithmetic's type, where they are held in another."""
    trained = _matrices(shape.trained)
    frozen = (_matrices(shape.total) - trained) * (scheme.arithmetic < scheme.frozen)
    return scheme.arithmetic * (trained * scheme.casts_trained + frozen)


def _gradient_copy(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> float:
    """The gradient of a layer's largest weights before it is added to the others. It is there in float32 too where
    autocast cast the weights, or where there are no others yet. Compiled layers still have their activations when that
    of the down projections alone is there."""
    part, tensors = ("experts", 3 if batch.compiled else 1) if shape.experts else ("feed_forward", 3)
    largest = shape.trained.get(part, 0) / shape.layers / tensors
    in_float32_too = scheme.casts_trained or (scheme.casts and batch.alone)
    return largest * (scheme.arithmetic + FLOAT32 * in_float32_too)
