"""What the memory of a step is counted from: a model's shape, the types that its numbers are held in, a micro-batch.

Shape letters: T tokens of a micro-batch, S sequence, D model, F feed-forward, E experts, K experts a token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from btx.moe.layer import weight_parts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

FLOAT32 = 4
CPU_ROWS = 512  # of logits alive at a time: at 512 x 2048 float32 they stay in a processor's cache


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
    """Attention takes a mask of S x S; otherwise borders alone."""
    on_gpu: bool = False
    """Routed rows go through torch's grouped product, not through the loop over experts; the head's gradient is added
    up by the product itself; libraries hold GPU_WORKSPACES bytes all the time."""
    compiled: bool = False
    """Layers are compiled, and the loss between its products: less is kept, more is computed again."""
    logit_rows: int = CPU_ROWS
    """Rows of logits that the loss holds at a time."""
    processes: int = 1
    """P: several train the model together, and T are the tokens that each has at a time (`btx.models.sharding`)."""
