"""Next-token loss without the logits of a whole batch in memory.

Shape letters: T tokens, D model, V vocabulary, r rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btx.data.mixture import NO_LABEL
from btx.models.memory import logit_rows
from btx.models.packed import copied_to, packed_hidden
from btx.training.working_weights import in_product

ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
COMPILED_CHUNK_LOSS = "compiled_chunk_loss"
"""Attribute of a model whose layers are compiled: `chunk_loss`, compiled as well."""


def chunk_loss(logits_rV: Tensor, labels_r: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of some rows, float32, and its gradient with respect to the logits: softmax − one-hot, in
    the logits' type. Overwrites float32 logits."""
    scored = (labels_r != NO_LABEL).float()[:, None]
    target = labels_r.clamp(min=0)[:, None]
    logits = logits_rV.float()
    log_normaliser = logits.logsumexp(dim=1, keepdim=True)
    total = ((log_normaliser - logits.gather(1, target)) * scored).sum()
    gradient = logits.sub_(log_normaliser).exp_()
    gradient.scatter_add_(1, target, -torch.ones_like(scored)).mul_(scored)
    return total, gradient.to(logits_rV.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T`, chunk by chunk, with the gradient computed on the way forward.

    The logits' gradient is known as soon as the logits are; so no chunk has to be kept or recomputed, and the (T, V)
    logits never exist at once. The weight's gradient is added up in float32 over all chunks.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, product_VD: Tensor, labels_T: Tensor, of_chunk: ChunkLoss,
        factors_T: Tensor | None,
    ) -> Tensor:  # fmt: skip
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        rows = logit_rows(len(weight_VD), on_gpu=hidden_TD.device.type != "cpu")
        done = 0
        chunks = (values.split(rows) for values in (hidden_TD, labels_T, grad_hidden_TD))
        for hidden, labels, grad_hidden in zip(*chunks, strict=True):
            loss, grad_logits = of_chunk(hidden @ product_VD.T, labels)
            total += loss
            if factors_T is not None:
                grad_logits *= factors_T[done : done + len(hidden), None]
                done += len(hidden)
            torch.mm(grad_logits, product_VD, out=grad_hidden)
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_logits.T, hidden)
            del grad_logits  # not held while the next chunk's is computed
        ctx.gradients = grad_hidden_TD, grad_weight_VD
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        grad_hidden_TD, grad_weight_VD = ctx.gradients
        ctx.gradients = None  # overwritten here, so that a vocabulary's gradient is held once
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.mul_(grad[0]).to(ctx.weight_dtype)
        return grad_hidden_TD.mul_(grad[0]), grad_weight_VD, None, None, None, None


def _add_product(total_VD: Tensor, left_Vr: Tensor, right_rD: Tensor) -> None:
    """total += left · right in float32. Where a GPU's product takes 16-bit numbers and adds to float32 it never rounds
    to 16 bits and reads and writes the total once."""
    if left_Vr.dtype != total_VD.dtype and _adds_to_float32(total_VD.device, left_Vr.dtype):
        torch.addmm(total_VD, left_Vr, right_rD, out_dtype=torch.float32, out=total_VD)
    else:
        total_VD += left_Vr @ right_rD


@cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch.addmm` adds products of 16-bit matrices to a float32 matrix in place here: tried, as it came with
    torch 2.8 for CUDA alone and is documented for no other case."""
    if device.type == "cpu":
        return False
    total, matrix = torch.ones(16, 16, device=device), torch.eye(16, device=device, dtype=dtype)
    try:
        torch.addmm(total, matrix, matrix, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return torch.equal(total, 1 + torch.eye(16, device=device))


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, of_chunk: ChunkLoss = chunk_loss, *,
    factors_T: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Summed cross-entropy, in nats, of the logits `hidden_TD @ weight_VD.T`, which are computed in the type of the
    hidden states; the weight's gradient has the weight's type. It can be differentiated once.

    Args:
        hidden_TD: last hidden states (T, D).
        weight_VD: the LM head (V, D).
        labels_T: next tokens (T,); -100 is not scored.
        of_chunk: `chunk_loss`, or the same compiled.
        factors_T: of each token's part in the gradient, which is then that of the weighted sum; the value is not.
    """
    product_VD = in_product(weight_VD, hidden_TD.dtype)
    return cast(Tensor, _LinearCrossEntropy.apply(hidden_TD, weight_VD, product_VD, labels_T, of_chunk, factors_T))


def token_losses(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Cross-entropy of every token, in nats, without a gradient: (T,), float32; 0 where nothing is scored. Arguments as
    `linear_cross_entropy`."""
    product_VD = in_product(weight_VD, hidden_TD.dtype)
    rows = logit_rows(len(weight_VD), on_gpu=hidden_TD.device.type != "cpu")
    with torch.no_grad():
        return torch.cat([
            F.cross_entropy((hidden @ product_VD.T).float(), labels, ignore_index=NO_LABEL, reduction="none")
            for hidden, labels in zip(hidden_TD.detach().split(rows), labels_T.split(rows), strict=True)
        ])  # fmt: skip


def head_inputs(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Last hidden states (T, D) as the head takes them, its weight (V, D), and labels (T,), all where the model is, of
    packed sequences (B, S) that lie on the host."""
    hidden = packed_hidden(model, input_ids, position_ids)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    weight = cast(Any, model).get_output_embeddings().weight
    return hidden.flatten(0, 1), weight, copied_to(hidden.device, labels.flatten())


def next_token_loss(model: nn.Module, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token loss, in nats, of packed sequences (B, S) that lie on the host."""
    of_chunk = getattr(model, COMPILED_CHUNK_LOSS, chunk_loss)
    return linear_cross_entropy(*head_inputs(model, input_ids, position_ids, labels), of_chunk)
