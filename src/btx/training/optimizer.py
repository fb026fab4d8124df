"""The optimiser: AdamW over the weights that train, its gradients' norm, and what a checkpoint keeps of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from btx.errors import RunFolderError
from btx.models.trainable import weight_parts
from btx.recipe.training import Finetune, Training

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def adamw(model: nn.Module, settings: Training) -> torch.optim.AdamW:
    """AdamW over the trainable weights of `model`; weight decay on matrices only, not on norms and biases.

    Each group has a `factor`: the multiple of the learning rate that its part of a MoE model trains with.
    """
    factors = settings.learning_rate_factors.model_dump() if isinstance(settings, Finetune) else {}
    parts = weight_parts(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((decay, factors.get(parts[name], 1.0)), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": members, "weight_decay": decay, "factor": factor} for (decay, factor), members in groups.items()],
        lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=1e-8, fused=True,
    )  # fmt: skip


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, each group's own multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def clip_gradients(model: nn.Module, largest: float, *, wait: bool = True) -> Tensor:
    """Global gradient norm, on the device; gradients are scaled down to `largest` where it is larger.

    Args:
        wait: look at the norm first, and leave gradients untouched that are small enough. Without, nothing waits for
            the device, and those are multiplied by 1.
    """
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if not (wait and norm.item() + 1e-6 <= largest):
        nn.utils.clip_grads_with_norm_(trained, largest, norm)
    return norm


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step_unless` can leave out a step of this optimiser: torch's fused ones."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def step_unless(optimizer: torch.optim.Optimizer, stopped: Tensor) -> None:
    """One step, which leaves weights and moments as they are if `stopped`, a float32 scalar on the device, is 1.

    That is how torch's GradScaler tells fused optimisers that a gradient was infinite: by `found_inf`.
    """
    cast(Any, optimizer).found_inf = stopped
    optimizer.step()


def kept_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a checkpoint holds: weights that train (and selection biases), and the optimiser's moments. Not copied."""
    trainable = _trainable(model)
    moments = {
        f"{moment}/{name}": optimizer.state[parameter][moment]
        for name, parameter in trainable.items() for moment in MOMENTS if parameter in optimizer.state
    }  # fmt: skip
    return trainable | _selection_biases(model), moments


def restore_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> None:
    """Put back what `kept_tensors` gave.

    Raises:
        RunFolderError: they are other weights than those that train.
    """
    trainable = _trainable(model)
    moved: dict[str, Tensor] = trainable | _selection_biases(model)
    if weights.keys() != moved.keys():
        raise RunFolderError("holds other weights than this stage trains; remove the stage's folder")
    with torch.no_grad():
        for name, tensor in moved.items():
            tensor.copy_(weights[name])
    for name, parameter in trainable.items():
        kept = {moment: moments.get(f"{moment}/{name}") for moment in MOMENTS}
        optimizer.state[parameter] = {
            moment: tensor.to(parameter.device) for moment, tensor in kept.items() if tensor is not None
        }


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _selection_biases(model: nn.Module) -> dict[str, Tensor]:
    """They move without a gradient; empty but for balancing without a loss."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(".selection_bias")}
