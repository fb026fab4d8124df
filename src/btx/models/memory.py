"""How much memory a training step holds at its peak, counted from the model's shape before anything is trained.

Counted is what `btx.training.step` does, tensor by tensor: weights, gradients and the optimiser's moments; what the
layers keep for the backward pass; a chunk of logits with its gradient (`btx.training.losses`); and the largest buffers
that come and go. The peak is the largest of four moments: the loss at the end of the forward pass, its backward pass,
the backward pass of the last layer, and the end of all. tests/test_memory.py compares with the tensors that are alive
in real steps on a CPU, and with peaks measured on an H100.

Not counted: what torch's allocator loses between its blocks, the CUDA context (about 0.5 GB), kernels' own buffers.
Compiled layers keep less than is counted here. Attention other than softmax attention is counted as if it were.

Shape letters: T tokens of a micro-batch, S sequence, D model, F feed-forward, V vocabulary, E experts, K experts a
token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from btx.moe.dispatch import tile_rows
from btx.moe.layer import weight_parts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

FLOAT32 = 4
CPU_ROWS = 512  # of logits alive at a time: at 512 x 2048 float32 they stay in a processor's cache
GPU_LOGITS = 2**28
"""Logits alive at a time on a GPU, 1 GiB in float32: every chunk reads and writes the (V, D) gradient of the head once,
which for Llama 3's vocabulary takes as long as its product does for 500 rows."""


@dataclass(frozen=True)
class MemoryScheme:
    """Bytes of a number, by what it is for; the default is float32 throughout.

    Embeddings, norms and routers are float32 in every scheme: what is said of weights is said of the matrices of linear
    layers and experts.
    """

    weight: float = 4.0
    """A weight that trains, as the optimiser moves it."""
    frozen: float = 4.0
    """A weight that does not train."""
    moments: float = 8.0
    """AdamW's two moments of a weight, together."""
    working: float = 0.0
    """A copy of a trained weight in the arithmetic's type, there all the time; a tied LM head has one too."""
    arithmetic: int = 4
    """A number in matrix products and in what they leave behind: 2 in bfloat16."""

    @property
    def casts(self) -> bool:
        """Whether every product makes a copy of its input, float32, in the arithmetic's type, and keeps it."""
        return self.arithmetic < FLOAT32

    @property
    def holds_copies(self) -> bool:
        """Whether products take weights as they are held; a tied LM head, float32 as an embedding, has a copy then."""
        return self.casts and not self.casts_trained

    @property
    def casts_trained(self) -> bool:
        """Whether trained weights are copied in the forward pass, for it and for the backward pass."""
        return not self.working and self.arithmetic < self.weight


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the memory of its training."""

    layers: int
    width: int
    """D."""
    heads: int
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together; the values' is taken to be the same."""
    feed_forward: int
    """F of a dense sublayer, or of one expert."""
    vocabulary: int
    tied: bool
    """Whether embedding and LM head are one tensor."""
    experts: int
    """E; 0 for a dense model."""
    experts_per_token: float
    """K: experts that are computed for a token in training, mean over layers."""
    shared_expert: int
    """F of an expert that every token uses; 0: there is none."""
    head_norms: bool
    """Whether queries and keys are normalised."""
    total: Mapping[str, int]
    """Part (embedding, head, norms, attention, feed_forward, experts, routers) → parameters."""
    trained: Mapping[str, int]
    """The same of those that train."""

    def trains(self, part: str) -> bool:
        """Whether weights of a part train."""
        return self.trained.get(part, 0) > 0

    @property
    def head_trains(self) -> bool:
        """Whether the LM head gets a gradient."""
        return self.trains("embedding" if self.tied else "head")


def model_shape(model: PreTrainedModel, *, experts_per_token: float) -> ModelShape:
    """The shape of a model with btx's MoE blocks in place; one on the meta device will do.

    Args:
        experts_per_token: experts that are computed for a token in training, mean over layers; 0 for a dense model.
    """
    config: Any = model.config
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    part_of_weight = {id(getattr(head, "weight", None)): "head", id(embedding.weight): "embedding"}
    moe_parts, total, trained = weight_parts(model), Counter[str](), Counter[str]()
    for name, parameter in model.named_parameters():
        part = part_of_weight.get(id(parameter)) or moe_parts[name]
        if part == "shared":
            part = "norms" if parameter.ndim < 2 else "attention" if "attn" in name else "feed_forward"
        total[part] += parameter.numel()
        trained[part] += parameter.numel() * parameter.requires_grad
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    expert_width = getattr(config, "moe_intermediate_size", None) if experts else None
    return ModelShape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        queries=config.num_attention_heads * head_size,
        keys=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_size,
        feed_forward=_widest(expert_width or getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
        vocabulary=config.vocab_size,
        tied=head is not None and head.weight is embedding.weight,
        experts=experts,
        experts_per_token=experts_per_token,
        shared_expert=(getattr(config, "shared_expert_intermediate_size", None) or 0) if experts else 0,
        head_norms=any("q_norm" in name for name in moe_parts),
        total=dict(total),
        trained=dict(trained),
    )


def _widest(width: int | Sequence[int]) -> int:
    """Of a class that names the width of every layer's feed-forward sublayer, the largest."""
    return width if isinstance(width, int) else max(width)


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


@dataclass(frozen=True)
class MicroBatch:
    """How a step goes through the model."""

    tokens: int
    """T."""
    sequence_length: int
    """S."""
    checkpointed: bool = False
    alone: bool = False
    """One micro-batch a step: no gradients are there yet while it runs."""
    dense_mask: bool = True
    """Attention takes a mask of S x S and has keys and values once a query head; otherwise borders alone."""
    grouped: bool = False
    """Routed rows go through torch's grouped product (GPUs), not through the loop over experts (CPUs)."""
    logit_rows: int = CPU_ROWS
    """Rows of logits that the loss holds at a time."""
    processes: int = 1
    """P: several train the model together, and T are the tokens that each has at a time (`btx.models.sharding`)."""


def logit_rows(vocabulary: int, *, on_gpu: bool) -> int:
    """Rows of logits that the loss holds at a time: a multiple of 128."""
    return max(CPU_ROWS, GPU_LOGITS // vocabulary // 128 * 128) if on_gpu else CPU_ROWS


def training_memory(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> TrainingMemory:
    """The peak of a training step, by what takes it; of several processes, that of each.

    Each of P processes has 1/P of the float32 weights, gradients and moments, and besides, from the forward pass to the
    end of the backward pass, every layer's weights put together in the arithmetic's type: a whole copy.
    """
    P, trained = batch.processes, sum(shape.trained.values())
    held = _weights_of_each(shape, scheme, P) if P > 1 else [(_weights(shape, scheme), 0.0)] * 4
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


def _weights_of_each(shape: ModelShape, scheme: MemoryScheme, processes: int) -> list[tuple[float, float]]:
    """(weights, buffers of the reduction) of one of several processes, in the order of `_moments`."""
    c, P, trained = scheme.arithmetic, processes, sum(shape.trained.values())
    root, root_trained = (sum(parts.get(part, 0) for part in ("embedding", "head")) for parts in
                          (shape.total, shape.trained))  # fmt: skip
    shares, layers = FLOAT32 * sum(shape.total.values()) / P, c * (sum(shape.total.values()) - root)
    together = FLOAT32 * root + c * shape.vocabulary * shape.width * (c < FLOAT32)  # the head in both types
    # A layer's gradients, whole, and in float32 those that are being added up over the processes.
    reduced = (c + FLOAT32) * (trained - root_trained) / shape.layers
    whole = shares + layers + together
    at_end = shares + FLOAT32 * root, FLOAT32 * root_trained  # the layers' are gone
    return [(whole, 0.0), (whole, 0.0), (whole, reduced - _gradient_copy(shape, scheme)), at_end]


def _moments(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> list[tuple[int, float, float, float]]:
    """(gradients are there, activations, logits, workspace) of the moments in which a step may be at its peak."""
    T, D, c, before = batch.tokens, shape.width, scheme.arithmetic, 0 if batch.alone else 1
    mask = T * batch.sequence_length if batch.dense_mask else 0  # bool, one for all layers
    top = T * D * (2 * FLOAT32 + c * scheme.casts)  # the last norm's input, its output, and a copy of that
    layer, copies = T * layer_bytes(shape, scheme, batch), _weight_copies(shape, scheme)
    if batch.checkpointed:
        kept: float = mask + shape.layers * T * D * FLOAT32
        by_autocast = _matrices(shape.trained) - shape.trained.get("experts", 0)  # which keeps the copies it has made
        at_end = kept + c * by_autocast * scheme.casts_trained
        in_backward, in_layer = kept, kept + layer + copies / shape.layers
    else:
        kept = mask + shape.layers * layer - T * _unused_in_first_layer(shape, scheme, batch) + copies
        at_end = in_backward = in_layer = kept
    head = shape.vocabulary * D if shape.head_trains else 0
    waiting = FLOAT32 * head * shape.tied  # the head's gradient, until the embedding's is there to be added to it
    at_loss = FLOAT32 * head + c * shape.vocabulary * D * scheme.casts_trained + T * D * c
    behind_loss = head * (2 * FLOAT32 + c * (c < FLOAT32)) + 2 * T * D * c
    gradients = T * _backward_bytes(shape, scheme) + _expert_rows(shape, scheme, batch)
    return [
        (before, at_end + top, at_loss + _logits_bytes(shape, scheme, batch), 0.0),
        (before, in_backward + top, behind_loss, 0.0),
        (before, in_layer, waiting, gradients + _gradient_copy(shape, scheme)),
        (1, 0.0, waiting, FLOAT32 * shape.vocabulary * D * shape.trains("embedding")),
    ]


def _logits_bytes(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> float:
    """A chunk of logits: twice in float32 for their logsumexp, or with its gradient in the arithmetic's type and the
    chunk's part in the gradient of the LM head."""
    rows, c = min(batch.logit_rows, batch.tokens) * shape.vocabulary, scheme.arithmetic
    gradient = c * rows * (c < FLOAT32) + c * shape.vocabulary * shape.width * shape.head_trains
    return FLOAT32 * rows + max(FLOAT32 * rows, gradient)


def layer_bytes(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> float:
    """Bytes a token that a layer keeps for its backward pass."""
    norm = FLOAT32 * (1 + shape.trains("norms")) * shape.width  # the input and the normalised input
    feed_forward = moe_bytes(shape, scheme, batch) if shape.experts else _dense_bytes(shape, scheme)
    return 2 * norm + _attention_bytes(shape, scheme, batch) + feed_forward


def _inputs(scheme: MemoryScheme, width: float, products: int) -> float:
    """The input of several products: autocast makes each a copy of its own."""
    return scheme.arithmetic * width * (products if scheme.casts else 1)


def _attention_bytes(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> float:
    """Queries, keys, values, output, the softmax's normalisers, and the mask as numbers to be added."""
    c, keys = scheme.arithmetic, shape.queries if batch.dense_mask else shape.keys
    count: float = c * (2 * shape.queries + 2 * keys) + FLOAT32 * shape.heads
    count += c * batch.sequence_length if batch.dense_mask else 0
    if shape.trains("attention"):
        count += _inputs(scheme, shape.width, 3)
    if shape.head_norms:
        count += (FLOAT32 + c * shape.trains("norms")) * (shape.queries + shape.keys)
    return count


def _dense_bytes(shape: ModelShape, scheme: MemoryScheme, width: int | None = None) -> float:
    """Gate, up, the activated gate, and their product, which only the down projection's gradient needs."""
    F, trains = shape.feed_forward if width is None else width, shape.trains("feed_forward")
    return scheme.arithmetic * F * (3 + trains) + _inputs(scheme, shape.width, 2) * trains


def moe_bytes(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> float:
    """Router and routed rows: K of them a token."""
    c, D, F, K = scheme.arithmetic, shape.width, shape.feed_forward, shape.experts_per_token
    router = shape.trains("routers") * c * D + 16 * shape.experts + 32 * K  # float32 logits, probabilities, gates, ids
    shared = _dense_bytes(shape, scheme, shape.shared_expert) if shape.shared_expert else 0.0
    if not batch.grouped:  # the input, and gate and up
        return router + shared + c * D * scheme.casts + 2 * c * F * K
    trains = shape.trains("experts")
    return router + shared + c * K * (F * (3 + trains) + D * (1 + trains))


def _unused_in_first_layer(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> float:
    """What the first layer does not keep where nothing below its feed-forward sublayer trains."""
    if any(shape.trains(part) for part in ("embedding", "attention", "norms")):
        return 0.0
    return 2 * FLOAT32 * shape.width + _attention_bytes(shape, scheme, batch)


def _backward_bytes(shape: ModelShape, scheme: MemoryScheme) -> float:
    """Bytes a token of gradients that are alive together in the backward pass of a layer: two of the stream, and what
    those of a dense sublayer are more than the activations that are gone by then."""
    dense = scheme.arithmetic * shape.feed_forward * (3 - shape.trains("feed_forward"))
    return 2 * FLOAT32 * shape.width + dense * (not shape.experts)


def _expert_rows(shape: ModelShape, scheme: MemoryScheme, batch: MicroBatch) -> float:
    """Gradients of routed rows: those of all for the grouped product, a tile's with the loop over experts."""
    if not shape.experts:
        return 0.0
    rows, c, D, F = batch.tokens * shape.experts_per_token, scheme.arithmetic, shape.width, shape.feed_forward
    if batch.grouped:
        return c * rows * 4 * F
    return c * (rows * D + min(rows, tile_rows(F)) * (2 * D + 5 * F))


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


def _gradient_copy(shape: ModelShape, scheme: MemoryScheme) -> float:
    """The gradient of a layer's largest weights before it is added to the others, in both types under autocast."""
    part, tensors = ("experts", 1) if shape.experts else ("feed_forward", 3)
    largest = shape.trained.get(part, 0) / shape.layers / tensors
    return largest * (FLOAT32 + scheme.arithmetic * (scheme.arithmetic < FLOAT32))
