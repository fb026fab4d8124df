"""Next-token loss without the logits of a whole batch in memory.

Shape letters: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from btx.data.mixture import NO_LABEL
from btx.models.packed import copied_to, packed_hidden
from btx.training.working_weights import in_product

CHUNK = 512  # rows of logits alive at a time: at 512 x 2048 float32 they stay in a processor's cache


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T`, chunk by chunk, with the gradient computed on the way forward.

    The logits' gradient is softmax − one-hot, known as soon as the logits are; so no chunk has to be kept or
    recomputed, and the (T, V) logits never exist at once.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden_TD), CHUNK):
            rows = slice(start, start + CHUNK)
            hidden, labels = hidden_TD[rows], labels_T[rows]
            scored = (labels != NO_LABEL).float()[:, None]
            target = labels.clamp(min=0)[:, None]
            logits = (hidden @ weight_VD.T).float()
            log_normaliser = logits.logsumexp(dim=1, keepdim=True)
            total += ((log_normaliser - logits.gather(1, target)) * scored).sum()
            grad_logits = logits.sub_(log_normaliser).exp_()
            grad_logits.scatter_add_(1, target, -torch.ones_like(scored)).mul_(scored)
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden_TD[rows] = grad_logits @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_logits.T @ hidden
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad[0]).to(ctx.weight_dtype)
        return grad_hidden_TD * grad[0], grad_weight_VD, None


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Summed cross-entropy, in nats, of the logits `hidden_TD @ weight_VD.T`.

    Args:
        hidden_TD: last hidden states (T, D).
        weight_VD: the LM head (V, D).
        labels_T: next tokens (T,); -100 is not scored.
    """
    return cast(Tensor, _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T))


def next_token_loss(model: nn.Module, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token loss, in nats, of packed sequences (B, S) that lie on the host."""
    hidden = packed_hidden(model, input_ids, position_ids)
    weight = cast(Any, model).get_output_embeddings().weight
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), in_product(weight, dtype)
    return linear_cross_entropy(hidden.flatten(0, 1), weight, copied_to(hidden.device, labels.flatten()))
