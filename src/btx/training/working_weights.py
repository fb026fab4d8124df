"""Weights that forward and backward use in bfloat16, cast once a step, while their float32 masters are trained.

Autocast alone casts every matrix in every micro-batch, and every gradient back. Here a matrix that trains is held as a
bfloat16 copy, which autocast takes as it is, and its gradients are added up in float32 as they come; the optimiser
moves the master and refreshes the copy. Products and gradients are those of autocast, bit for bit (mixed precision with
master weights: Micikevicius et al., arXiv 1710.03740, section 3.1).

Only what is used in matrix products alone is held so: linear layers and experts. Embeddings stay in float32, because
the gradient of a lookup adds up rows in the type of the table, and what is looked up is the residual stream; so do
norms, biases and routers. The language-model head stays too, tied or not, and has a copy beside it: its gradient, which
the loss adds up in float32, needs no rounding.

Matrices that do not train are held in bfloat16 alone, which is what autocast would make of them, and embeddings where
that loses nothing. Whatever lost something is read again from where it came before the model is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from btx.models.loading import load_model
from btx.moe.layer import Experts

MASTER, HEAD, ROUNDED = "float32_master", "bfloat16_copy", "was_rounded"
"""Attributes of a parameter: its master, the copy that the language-model head uses, and whether it lost something."""


def master_of(parameter: nn.Parameter) -> nn.Parameter:
    """What the optimiser moves for a weight of the model: its float32 master, or the weight itself if it has none."""
    return cast(nn.Parameter, getattr(parameter, MASTER, parameter))


def hold_frozen_in_bfloat16(model: nn.Module) -> None:
    """Hold matrices that do not train in bfloat16, and embeddings whose numbers are bfloat16's; on the host, before
    `model` goes to its device."""
    matrices = {id(parameter) for parameter in _matrices(model)}
    for parameter in model.parameters():
        if parameter.requires_grad or parameter.dtype != torch.float32 or parameter.ndim < 2:
            continue
        looking_up = [module for module in model.modules() if getattr(module, "weight", None) is parameter]
        is_table = bool(looking_up) and all(type(module) in (nn.Embedding, nn.Linear) for module in looking_up)
        if id(parameter) not in matrices and not is_table:
            continue
        rounded = parameter.data.bfloat16()
        exact = torch.equal(rounded.float(), parameter.data)
        if id(parameter) in matrices or exact:
            parameter.data = rounded
            setattr(parameter, ROUNDED, not exact)
            for module in looking_up:
                if isinstance(module, nn.Embedding):  # the residual stream stays in float32
                    module.register_forward_hook(lambda module, inputs, output: output.float())


def hold_in_bfloat16(model: nn.Module, *, masters: bool, gradients: torch.dtype) -> None:
    """Make every matrix that trains a bfloat16 copy of a float32 master; the head stays and gets a copy beside it.

    From here on the gradient of such a matrix is its master's as soon as it is there.

    Args:
        masters: False: there are none, the bfloat16 weights themselves are trained.
        gradients: type in which gradients of these matrices are added up.
    """
    head = cast(Any, model).get_output_embeddings()
    for parameter in _matrices(model):
        if not parameter.requires_grad or (head is not None and parameter is head.weight):
            continue
        if masters:
            master = nn.Parameter(parameter.data)
            setattr(parameter, MASTER, master)
            parameter.register_post_accumulate_grad_hook(_add_to_master)
        parameter.data = parameter.data.bfloat16()
        if gradients != master_of(parameter).dtype:
            master_of(parameter).grad_dtype = gradients
    if head is not None and head.weight.dtype == torch.float32:
        setattr(head.weight, HEAD, head.weight.detach().bfloat16())


def refresh_copies(model: nn.Module) -> None:
    """Cast the masters into the copies: after every optimiser step, and after a checkpoint was loaded."""
    pairs = list(_copies(model))
    if pairs:
        with torch.no_grad():
            torch._foreach_copy_([copy for copy, _ in pairs], [master for _, master in pairs])


def give_back_float32(model: nn.Module) -> None:
    """Make every weight that trains its float32 master again, as it is to be saved."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = master_of(parameter).data.float()
        for attribute in (MASTER, HEAD):
            if hasattr(parameter, attribute):
                delattr(parameter, attribute)


def give_back_frozen(model: nn.Module, start: Path) -> None:
    """Put back what frozen weights lost in bfloat16, from the model folder that they came from.

    Raises:
        CheckpointError: that is no longer a model that can be loaded.
    """
    lost = [name for name, parameter in model.named_parameters() if getattr(parameter, ROUNDED, False)]
    if lost:
        as_it_came = load_model(start)
        for name in lost:
            frozen = model.get_parameter(name)
            # An adapter holds the weight as its `base_layer`, two on a module one in the other (`btx.models.adapters`).
            frozen.data = as_it_came.get_parameter(name.replace(".base_layer", "")).data.to(frozen.device)


def in_product(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight's values as a product takes them, without a gradient: the copy of this step if there is one, else cast
    now."""
    copy = getattr(weight, HEAD, None)
    return weight.detach().to(dtype) if copy is None else cast(Tensor, copy)


def _add_to_master(parameter: Tensor) -> None:
    """Hook: the gradient of this micro-batch moves over to the master, which adds up in its own type."""
    gradient, master = cast(Tensor, parameter.grad), getattr(parameter, MASTER, None)
    if master is None:  # given back
        return
    if master.grad is None:
        master.grad = gradient.to(master.grad_dtype)
    else:
        master.grad.add_(gradient)
    parameter.grad = None


def _copies(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(copy, float32 weight) of all that is cast once a step."""
    for parameter in model.parameters():
        if hasattr(parameter, MASTER):
            yield parameter, master_of(parameter)
        if (copy := getattr(parameter, HEAD, None)) is not None:
            yield copy, parameter


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    """Float32 weights of linear layers and experts that no embedding shares."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    of_linear = [module.weight for module in model.modules() if type(module) is nn.Linear]
    of_experts = [p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()]
    both = cast(list[nn.Parameter], of_linear + of_experts)
    return [p for p in both if id(p) not in looked_up and p.dtype == torch.float32]
