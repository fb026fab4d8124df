"""Parameters and FLOPs of models, counted from their configs before anything is trained.

FLOPs follow the usual count: 6·N FLOPs a token for N multiplied parameters (Kaplan et al., arXiv 2001.08361, section
2.1) plus 12·L·H·Q·S for attention over S tokens (PaLM, arXiv 2204.02311, appendix B), L layers, H heads of size Q. The
6 are 2 forward, 2 for the gradient of the product's input and 2 for that of its weights; frozen weights have no
gradient of their own, so with M trained ones it is 4·N + 2·M. What is saved below the lowest weight that trains (in a
feed-forward branch: the first attention sublayer) is not credited. An untied input embedding is looked up, not
multiplied, and does not count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from btx.models.adapters import plan_adapters
from btx.models.configs import config_text
from btx.models.step_counts import ModelShape, model_shape
from btx.models.trainable import set_trainable
from btx.moe.layer import mean_experts_per_token, swap_in_moe

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


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
    trained_multiplied_params: int
    """Those of `multiplied_params` that train."""
    shape: ModelShape
    """From which the memory of a training is counted (`btx.models.memory`)."""

    def training_flops_per_token(self, sequence_length: float) -> float:
        """4·N + 2·M + 12·L·H·Q·S, M of the N multiplied parameters train."""
        products = 4.0 * self.multiplied_params + 2.0 * self.trained_multiplied_params
        return products + 12.0 * self.attention_width * sequence_length

    def inference_flops_per_token(self, sequence_length: int) -> float:
        """The forward pass: 2·N + 4·L·H·Q·S."""
        return 2.0 * self.multiplied_params + 4.0 * self.attention_width * sequence_length


def model_cost(model: PreTrainedModel, *, experts_per_token: float | None = None) -> ModelCost:
    """Count a model's parameters (a model on the meta device will do).

    Args:
        experts_per_token: experts a token uses, mean over layers; None: as the model's routers say, or its config.
    """
    config: Any = model.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    used = experts_per_token or mean_experts_per_token(model) or (_top_k(config, experts) if experts else 0.0)
    unused_share = 1 - used / experts if experts else 0.0
    named = list(model.named_parameters())
    lookup = None if config.tie_word_embeddings else model.get_input_embeddings().weight
    shape = model_shape(model, experts_per_token=used)

    def active(parameters: Iterable[tuple[str, nn.Parameter]], *, multiplied: bool) -> int:
        sizes = [(name, p.numel()) for name, p in parameters if not (multiplied and p is lookup)]
        in_experts = sum(size for name, size in sizes if ".experts." in name)
        return sum(size for _, size in sizes) - round(unused_share * in_experts)

    trained = [(name, p) for name, p in named if p.requires_grad]
    return ModelCost(
        total_params=sum(p.numel() for _, p in named),
        active_params=active(named, multiplied=False),
        multiplied_params=active(named, multiplied=True),
        attention_width=shape.layers * shape.queries,
        trained_multiplied_params=active(trained, multiplied=True),
        shape=shape,
    )


def _top_k(config: Any, experts: int) -> float:
    """Experts that a token uses, mean over layers, where no router says so; all of them where the config does not."""
    for name in ("num_experts_per_tok", "top_k_experts"):  # the second one is Gemma 4's
        said = getattr(config, name, None)
        if isinstance(said, Sequence) and said:  # one a layer (HunYuan)
            return sum(said) / len(said)
        if isinstance(said, int):
            return said
    return experts


def side_by_side(costs: Sequence[ModelCost], top_k: int) -> ModelCost:
    """Whole models of which `top_k` answer for a token: all parameters; of what a token uses, `top_k` mean models."""

    def of_top_k(counts: Sequence[int]) -> int:
        return round(top_k * sum(counts) / len(counts))

    return replace(
        costs[0],
        total_params=sum(cost.total_params for cost in costs),
        active_params=of_top_k([cost.active_params for cost in costs]),
        multiplied_params=of_top_k([cost.multiplied_params for cost in costs]),
        attention_width=of_top_k([cost.attention_width for cost in costs]),
        trained_multiplied_params=of_top_k([cost.trained_multiplied_params for cost in costs]),
    )


def config_cost(
    config: dict[str, Any], *, experts_per_token: float | None = None, trainable: str = "all", lora_rank: int = 0
) -> ModelCost:
    """`model_cost` of a config, without allocating its weights.

    Args:
        trainable: what trains, as in a recipe.
        lora_rank: of the adapters that count too where `trainable` is lora.
    """
    return _config_cost(config_text(config), experts_per_token, trainable, lora_rank)


@cache
def _config_cost(config: str, experts_per_token: float | None, trainable: str, lora_rank: int) -> ModelCost:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config)))
        swap_in_moe(model)
    if trainable == "lora":
        plan_adapters(model, lora_rank)
    elif trainable != "all":
        set_trainable(model, trainable)
    return model_cost(model, experts_per_token=experts_per_token)
