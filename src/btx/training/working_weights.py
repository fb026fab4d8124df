"""Weights that forward and backward use in bfloat16, cast once a step, while their float32 masters are trained.

Autocast alone casts every matrix in every micro-batch, and every gradient back. Here a matrix that trains is held as a
bfloat16 copy, which autocast takes as it is, and its gradients are added up in float32 as they come; the optimiser
moves the master and refreshes the copy. Products and gradients are those of autocast, bit for bit (mixed precision with
master weights: Micikevicius et al., arXiv 1710.03740, section 3.1).

Only what is used in matrix products alone is held so: linear layers and experts. Embeddings stay in float32, because
the gradient of a lookup adds up rows in the type of the table and what is looked up is the residual stream; so do
norms, biases and routers. A language-model head that is tied to the embeddings gets a copy of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from btx.moe.layer import Experts

MASTER, HEAD = "float32_master", "bfloat16_copy"
"""Attributes of a parameter: its master, and the copy that the language-model head uses."""


def master_of(parameter: nn.Parameter) -> nn.Parameter:
    """What the optimiser moves for a weight of the model: its float32 master, or the weight itself if it has none."""
    return cast(nn.Parameter, getattr(parameter, MASTER, parameter))


def hold_in_bfloat16(model: nn.Module) -> None:
    """Give every matrix that trains a float32 master and make it a bfloat16 copy; the head gets a copy if it is tied.

    From here on a gradient of such a matrix is its master's, in float32, as soon as it is there.
    """
    for parameter in _matrices(model):
        if parameter.requires_grad and not hasattr(parameter, MASTER):
            master = nn.Parameter(parameter.data)
            setattr(parameter, MASTER, master)
            parameter.data = parameter.data.bfloat16()
            parameter.register_post_accumulate_grad_hook(_add_to_master)
    head = cast(Any, model).get_output_embeddings()
    if head is not None and head.weight.dtype == torch.float32:
        setattr(head.weight, HEAD, head.weight.detach().bfloat16())


def refresh_copies(model: nn.Module) -> None:
    """Cast the masters into the copies: after every optimiser step, and after a checkpoint was loaded."""
    pairs = list(_copies(model))
    if pairs:
        with torch.no_grad():
            torch._foreach_copy_([copy for copy, _ in pairs], [master for _, master in pairs])


def give_back_masters(model: nn.Module) -> None:
    """Make every weight of `model` its float32 master again, as it is to be saved."""
    for parameter in model.parameters():
        parameter.data = master_of(parameter).data
        for attribute in (MASTER, HEAD):
            if hasattr(parameter, attribute):
                delattr(parameter, attribute)


def in_product(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as a product under autocast takes it: the copy of this step if there is one, else cast now."""
    copy = getattr(weight, HEAD, None)
    return weight.to(dtype) if copy is None else cast(Tensor, _Copy.apply(weight, copy))


class _Copy(torch.autograd.Function):
    """The copy of a weight in its place; the gradient is the weight's, cast as autocast's would be."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0].to(ctx.dtype), None


def _add_to_master(parameter: Tensor) -> None:
    """Hook: the gradient of this micro-batch moves over to the master, which adds up in float32."""
    gradient, master = cast(Tensor, parameter.grad), getattr(parameter, MASTER, None)
    if master is None:  # given back
        return
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
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
    """Weights of linear layers and experts that no embedding shares."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    of_linear = [module.weight for module in model.modules() if type(module) is nn.Linear]
    of_experts = [p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()]
    return [p for p in (*of_linear, *of_experts) if id(p) not in looked_up and p.dtype == torch.float32]
