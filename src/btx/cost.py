"""Parameters, FLOPs and memory of models, counted from their configs before anything is trained.

FLOPs follow the usual count: 6·N FLOPs a token for N multiplied parameters (2 forward, 4 backward; Kaplan et al., arXiv
2001.08361, section 2.1) plus 12·L·H·Q·S for attention over S tokens (PaLM, arXiv 2204.02311, appendix B), L layers, H
heads of size Q. An untied input embedding is looked up, not multiplied, and does not count. Frozen weights are
counted as if they trained (their 2·N backward is saved, but not credited), so a frozen branch is never flattered.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from btx.moe import mean_experts_per_token, swap_in_moe
from btx.trainable import set_trainable, trainable_parameters


@dataclass(frozen=True)
class ModelCost:
    """Size and compute of one model."""

    total_params: int
    active_params: int
    """Parameters a token uses: all but the experts it is not routed to."""
    multiplied_params: int
    """Active parameters that take part in matrix products."""
    attention_width: int
    """L·H·Q: layers times heads times head size."""
    trained_params: int
    """Parameters that have a gradient and optimiser state."""

    def training_flops_per_token(self, sequence_length: int) -> float:
        """6·N + 12·L·H·Q·S."""
        return 6.0 * self.multiplied_params + 12.0 * self.attention_width * sequence_length

    def inference_flops_per_token(self, sequence_length: int) -> float:
        """The forward pass, a third of training: 2·N + 4·L·H·Q·S."""
        return self.training_flops_per_token(sequence_length) / 3

    def training_bytes(self) -> int:
        """Weights, and of what trains gradients and AdamW's two moments, in float32; activations come on top."""
        return 4 * self.total_params + 12 * self.trained_params

    def checkpoint_bytes(self) -> int:
        """A resumable checkpoint: the weights that train and AdamW's two moments, in float32."""
        return 12 * self.trained_params


def model_cost(model: nn.Module, *, experts_per_token: float | None = None) -> ModelCost:
    """Count a model's parameters (a model on the meta device will do).

    Args:
        experts_per_token: experts a token uses, mean over layers; None: as the model's routers say, or its config.
    """
    config: Any = model.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    used = experts_per_token or mean_experts_per_token(model) or (config.num_experts_per_tok if experts else 0)
    unused_share = 1 - used / experts if experts else 0.0
    total = sum(p.numel() for p in model.parameters())
    in_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    active = total - round(unused_share * in_experts)
    tied = config.tie_word_embeddings
    lookup = 0 if tied else config.vocab_size * config.hidden_size
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_hidden_layers * config.num_attention_heads * head_size
    return ModelCost(total, active, active - lookup, width, trainable_parameters(model))


def config_cost(
    config: dict[str, Any], *, experts_per_token: float | None = None, trainable: str = "all"
) -> ModelCost:
    """`model_cost` of a config, without allocating its weights.

    Args:
        trainable: what trains, as in a recipe.
    """
    return _config_cost(json.dumps(config, sort_keys=True), experts_per_token, trainable)


@cache
def _config_cost(config: str, experts_per_token: float | None, trainable: str) -> ModelCost:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = json.loads(config)
    model_type = values.pop("model_type")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
        swap_in_moe(model)
    if trainable != "all":
        set_trainable(model, trainable)
    return model_cost(model, experts_per_token=experts_per_token)
