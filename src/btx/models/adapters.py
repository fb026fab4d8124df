"""LoRA adapters (Hu et al., arXiv 2106.09685), by peft: added before training, merged into the weights after it. So
what is written is a plain model, and nothing else knows of adapters.

On a dense model every FF projection W (out, in) gets A (rank, in), random, and B (out, rank), zero, and computes
W x + (alpha / rank) B A x. On a MoE model the experts get them, each expert its own, and the attention's projections;
routers, embeddings and the head get none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from btx.errors import CheckpointError
from btx.models.trainable import trainable_names
from btx.moe.layer import MoE, moe_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def adapted_modules(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Name → FF projection, of those that adapters go on; fused ones (Phi-3's gate_up_proj) are one."""
    names = sorted(name.removesuffix(".weight") for name in trainable_names(model, "feed_forward"))
    modules = {name: model.get_submodule(name) for name in names}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}


def add_adapters(model: PreTrainedModel, rank: int, alpha: float, *, rng_seed: int) -> None:
    """Put adapters on the FF projections, in place; nothing else trains. The model computes what it did before.
    Adapters of a model on the meta device (`btx.models.sharded_loading`) have their numbers at once.

    Args:
        rng_seed: decides A.
    """
    _add(model, adapted_modules(model), [], rank, alpha, rng_seed)


EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


def moe_targets(model: PreTrainedModel) -> tuple[dict[str, nn.Linear], list[str]]:
    """What `add_moe_adapters` puts adapters on: name → linear layer of the attention, and names of the experts'
    weights."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    if not blocks:
        raise CheckpointError(f"trainable: lora: {type(model).__name__} has no experts that adapters can be put on")
    experts = [f"{name}.experts.{weight}" for name in blocks for weight in EXPERT_WEIGHTS]
    layers = {
        name: module
        for name, module in model.base_model.named_modules(prefix=model.base_model_prefix)
        if isinstance(module, nn.Linear) and not any(name.startswith(f"{block}.") for block in blocks)
    }
    return layers, experts


def add_moe_adapters(model: PreTrainedModel, rank: int, alpha: float, *, rng_seed: int) -> None:
    """Put adapters on the experts and on the attention of a MoE model, in place; arguments as
    `add_adapters`."""
    layers, experts = moe_targets(model)
    _add(model, layers, experts, rank, alpha, rng_seed)


def _add(
    model: PreTrainedModel, modules: Mapping[str, nn.Linear], weights: Sequence[str], rank: int, alpha: float,
    rng_seed: int,
) -> None:  # fmt: skip
    from peft import LoraConfig, inject_adapter_in_model

    on_meta = {module: module.weight for module in modules.values() if module.weight.is_meta}
    for module, weight in on_meta.items():  # peft asks where they are; these are on the host and take no memory
        module.weight = nn.Parameter(torch.empty(1).expand(weight.shape), requires_grad=False)
    scale: Any = int(alpha) if alpha == int(alpha) else alpha  # peft declares whole numbers; others divide as well
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=list(modules), target_parameters=list(weights) or None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng_seed)
        inject_adapter_in_model(config, model)
    for module, weight in on_meta.items():
        module.weight = weight.requires_grad_(False)


def plan_adapters(model: PreTrainedModel, rank: int) -> None:
    """Give a model on the meta device the parameters that `add_adapters`, or for a MoE model `add_moe_adapters`, would,
    for counting; needs no peft."""
    blocks = moe_blocks(model)
    modules = moe_targets(model)[0] if blocks else adapted_modules(model)
    model.requires_grad_(False)
    for block in blocks:
        for name in EXPERT_WEIGHTS:
            E, out, into = getattr(block.experts, name).shape
            block.experts.register_parameter(f"{name}_lora_A", nn.Parameter(torch.empty(E * rank, into, device="meta")))
            block.experts.register_parameter(f"{name}_lora_B", nn.Parameter(torch.empty(out, E * rank, device="meta")))
    for module in modules.values():
        module.lora_A = nn.Parameter(torch.empty(rank, module.in_features, device="meta"))
        module.lora_B = nn.Parameter(torch.empty(module.out_features, rank, device="meta"))


def merge_adapters(model: nn.Module) -> None:
    """Merge the adapters of `add_adapters` into the weights, W + (alpha / rank) B A in float32, and take them off; the
    model is then as it was before them. One without adapters is left alone."""
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for layer in layers.values():
        layer.get_base_layer().float()
        layer.merge()
    for name, layer in layers.items():
        if not any(name.startswith(f"{outer}.") for outer in layers):  # of two on a module one holds the other
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
