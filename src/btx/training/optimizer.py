"""The optimiser: AdamW over the weights that train, its gradients' norm, and what a checkpoint keeps of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from btx.errors import RunFolderError
from btx.models.device import in_bfloat16
from btx.models.sharding import as_rows_of, local_rows, process_count, whole
from btx.models.trainable import weight_parts
from btx.recipe.training import Finetune, Training
from btx.training.eight_bit import PARTS, adamw_8bit, from_parts, parts_of
from btx.training.working_weights import hold_in_bfloat16, master_of, refresh_copies

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def adamw(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """AdamW over the trainable weights of `model`; weight decay on matrices only, not on norms and biases.

    Each group has a `factor`: the multiple of the learning rate that its part of a MoE model trains with. Where `model`
    is to train in bfloat16 its matrices become copies of float32 masters, which the optimiser moves: see
    `btx.training.working_weights`. Of a sharded model each process's float32 rows are the masters, and FSDP2 puts the
    copies together (`btx.models.sharding`).

    Raises:
        UserError: `optimizer` is adamw_8bit and torchao is not installed.
    """
    device = next(model.parameters()).device
    if copies := in_bfloat16(settings.precision, device) and process_count() == 1:
        hold_in_bfloat16(model, masters=settings.weights == "float32", gradients=_gradient_type(settings))
    factors = settings.learning_rate_factors.model_dump() if isinstance(settings, Finetune) else {}
    parts = weight_parts(model)
    by_setting: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            by_setting.setdefault((decay, factors.get(parts[name], 1.0)), []).append(master_of(parameter))
    groups: list[dict[str, Any]] = [
        {"params": members, "weight_decay": decay, "factor": factor}
        for (decay, factor), members in by_setting.items()
    ]  # fmt: skip
    optimizer = (
        adamw_8bit(groups, settings, device) if settings.optimizer == "adamw_8bit" else
        torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=1e-8, fused=True
        )
    )  # fmt: skip
    if copies:
        optimizer.register_step_post_hook(lambda *_: refresh_copies(model))
    return optimizer


def _gradient_type(settings: Training) -> torch.dtype:
    """Of matrices' gradients from one micro-batch to the next: float32, or as they come if nothing is added to them and
    the optimiser takes them so."""
    added_up = settings.micro_batch_tokens == "auto" or settings.micro_batch_tokens < settings.batch_tokens
    return torch.bfloat16 if settings.optimizer == "adamw_8bit" and not added_up else torch.float32


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, each group's own multiple of it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's
            group["lr"].fill_(rate * group["factor"])
        else:
            group["lr"] = rate * group["factor"]


def clip_gradients(model: nn.Module, largest: float, *, wait: bool = True) -> Tensor:
    """Global gradient norm, on the device; gradients are scaled down to `largest` where it is larger.

    Args:
        wait: look at the norm first, and leave gradients untouched that are small enough. Without, nothing waits for
            the device, and those are multiplied by 1.
    """
    trained = [p for p in map(master_of, model.parameters()) if p.grad is not None]
    norm = whole(_total_norm([p.grad for p in trained if p.grad is not None]))
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


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """In float32: torch's own would round the norm of bfloat16 gradients to bfloat16."""
    if all(gradient.dtype != torch.bfloat16 for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def kept_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a checkpoint holds: weights that train (and selection biases), and the optimiser's moments. Not copied.

    Weights are the float32 masters where there are any. A moment in 8 bits is several plain tensors.
    """
    trainable = _trainable(model)
    moments = {
        f"{moment}{part}/{name}": tensor
        for name, parameter in trainable.items() for moment in MOMENTS if parameter in optimizer.state
        for part, tensor in parts_of(optimizer.state[parameter][moment]).items()
    }  # fmt: skip
    return kept_weights(model), moments


def kept_weights(model: nn.Module) -> dict[str, Tensor]:
    """The first of them."""
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith(".selection_bias")}
    return _trainable(model) | biases  # these move without a gradient


def restore_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> None:
    """Put back what `kept_tensors` gave.

    Args:
        weights, moments: of sharded ones the rows that this process holds.

    Raises:
        RunFolderError: they are other weights than those that train.
    """
    trainable = _trainable(model)
    moved = kept_weights(model)
    if weights.keys() != moved.keys():
        raise RunFolderError("holds other weights than this stage trains; remove the stage's folder")
    with torch.no_grad():
        for name, tensor in moved.items():
            local_rows(tensor).copy_(weights[name])
    refresh_copies(model)
    for name, parameter in trainable.items():
        kept = {moment: _parts(moments, moment, name) for moment in MOMENTS}
        optimizer.state[parameter] = {
            moment: _step(parts[""], optimizer, parameter) if moment == "step" else
            as_rows_of(from_parts(parts, parameter, signed=moment == "exp_avg"), parameter)
            for moment, parts in kept.items() if parts
        }  # fmt: skip


def _parts(moments: Mapping[str, Tensor], moment: str, name: str) -> dict[str, Tensor]:
    suffixes = ("", *(f".{part}" for part in PARTS))
    return {suffix: moments[key] for suffix in suffixes if (key := f"{moment}{suffix}/{name}") in moments}


def _step(step: Tensor, optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """The number of steps where the optimiser has it: beside the weight, or on the host."""
    return step.to(parameter.device) if isinstance(optimizer, torch.optim.AdamW) else step.cpu()


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimiser moves, under the model's names."""
    return {name: master_of(p) for name, p in model.named_parameters() if p.requires_grad}
