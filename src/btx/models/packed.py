"""Packed rows through a model: the one place where training, evaluation, router fitting and analysis run it.

Attention stops where `position_ids` restart. On a CPU, and on an NVIDIA GPU in half precision, it is computed document
by document (`btx.models.document_attention`) and costs what the documents cost; elsewhere, and where a model's class
does what that cannot, transformers makes a block-diagonal mask of S x S a row from the positions.

Shape letters: B batch, S sequence, D model, N borders.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

TOKENS_PER_DOCUMENT = 256
"""Borders are padded as if documents had so many tokens on average, so that their shape stays from batch to batch."""


def packed_hidden(model: nn.Module, input_ids_BS: Tensor, position_ids_BS: Tensor) -> Tensor:
    """Last hidden states (B, S, D), on the last layer's device, of rows that hold several documents each.

    Args:
        input_ids_BS: token ids, on the host or on the model's device.
        position_ids_BS: tokens since the document's start, or since the row's; on the host, for borders are counted
            there. On a GPU counting would make the host wait for it.
    """
    base = _decoder(model)
    mask = None  # transformers derives the mask from the positions, provided there is no cache
    if dense_mask_because(model) is None:
        from btx.models.document_attention import mask_of_borders

        borders_N = torch.from_numpy(document_borders(position_ids_BS.numpy(force=True)))
        mask = mask_of_borders(copied_to(base.device, borders_N))
    output = base(
        input_ids=copied_to(base.device, input_ids_BS), position_ids=copied_to(base.device, position_ids_BS),
        attention_mask=mask, use_cache=False,
    )  # fmt: skip
    return cast(Tensor, output.last_hidden_state)


def _decoder(model: nn.Module) -> Any:
    """A causal language model without its head; Llama 4's text class calls it otherwise than it says."""
    base = cast(Any, model).base_model
    return base.model if base is model and hasattr(base, "model") else base


def copied_to(device: torch.device, values: Tensor) -> Tensor:
    """`values` on `device`, without the host waiting until a GPU has done what it was told before."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def dense_mask_because(model: nn.Module) -> str | None:
    """Why `model` reads packed rows with a dense mask, on its device and in the present autocast; None if it reads them
    document by document."""
    base = _decoder(model)
    kind = base.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.dtype
    if (reason := without_kernel(base.device, dtype)) is not None:
        return reason
    from btx.models.document_attention import let_read_documents  # loads transformers

    return let_read_documents(cast(Any, model))


def without_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is no attention of documents for this device and type; None if there is."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return "its kernels are for CPUs and NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"its kernel is for Ampere and later, and this GPU is a {torch.cuda.get_device_name(device)}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its kernel is for bfloat16 and float16, and this model computes in {str(dtype).split('.')[-1]}"
    return None


def document_borders(position_ids_BS: np.ndarray) -> np.ndarray:
    """Where documents begin in the rows laid one after the other, then the end B·S, repeated: (N,), int32.

    N - 1 is B·S / 256, doubled until all documents fit: a CUDA graph is recorded for each shape, so there should be
    few, and empty documents cost next to nothing. Zeros at the end of a row are padding, which is read as one document;
    a document has two tokens at least, so nothing else looks like that.
    """
    B, S = position_ids_BS.shape
    begins_BS = np.ones((B, S), bool)
    begins_BS[:, 1:] = position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1
    padding_BS = np.logical_and.accumulate(position_ids_BS[:, ::-1] == 0, axis=1)[:, ::-1]
    begins_BS[:, 1:] &= ~(padding_BS[:, 1:] & padding_BS[:, :-1])
    begins = np.flatnonzero(begins_BS)
    places = max(B, B * S // TOKENS_PER_DOCUMENT)
    while places < len(begins):
        places *= 2
    borders_N = np.full(places + 1, B * S, np.int32)
    borders_N[: len(begins)] = begins
    return borders_N
