"""Bits per byte: Σ bits of all text tokens over Σ UTF-8 bytes, which compares models with different tokenizers.

Every text byte of a document is scored once; the separator in front of a document is context, its end-of-text token is
not scored.

Shape letters: N documents, R scored tokens, T text tokens of a document.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from btx.data.held_out import HeldOutDocument, Packed, pack
from btx.models.outputs import MICRO_BATCH_TOKENS, SideBySide, token_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte of one model on one domain."""

    bits_per_byte: float
    stderr: float | None
    """Standard error over documents; None with a single document."""
    tokens: int
    """Scored tokens."""
    bytes: int
    """UTF-8 bytes of the scored text."""
    seconds: float
    """Wall seconds of the forward passes."""
    document_bits: list[float]
    """Bits of each document: what models are compared by, document by document (`btx.evaluation.compare`)."""

    def as_json(self) -> dict[str, Any]:
        """The entry of results.json."""
        return {"bits_per_byte": self.bits_per_byte, "stderr": self.stderr, "tokens": self.tokens, "bytes": self.bytes}


def bits_per_byte(model: PreTrainedModel | SideBySide, packed: Packed) -> BitsPerByte:
    """Σ nll / Σ bytes / ln 2 over all documents, with its standard error.

    Args:
        packed: held-out documents as `btx.data.held_out.pack` lays them out.
    """
    started = time.perf_counter()
    nll_N = torch.zeros(len(packed.bytes_N), dtype=torch.float64)
    for rows in packed.batches(MICRO_BATCH_TOKENS):
        nll_R = token_nll(model, rows)
        nll_N.index_add_(0, rows.document_ids_BS[rows.scored_BS], nll_R.double().cpu())
    bits_N = nll_N / math.log(2)
    value, stderr = ratio(bits_N, packed.bytes_N.double())
    return BitsPerByte(
        bits_per_byte=value, stderr=stderr, tokens=int(packed.scored_BS.sum()), bytes=int(packed.bytes_N.sum()),
        seconds=time.perf_counter() - started, document_bits=[round(bits, 4) for bits in bits_N.tolist()],
    )  # fmt: skip


def ratio(value_N: Tensor, size_N: Tensor) -> tuple[float, float | None]:
    """Ratio estimator Σ value / Σ size and its standard error over N documents (linearised; None for N = 1).

    Source: Cochran, Sampling Techniques (1977), section 6.4.
    """
    total, n = size_N.sum(), len(size_N)
    estimate = value_N.sum() / total
    if n == 1:
        return float(estimate), None
    residual_N = value_N - estimate * size_N
    return float(estimate), float((residual_N.square().sum() * n / (n - 1)).sqrt() / total)


def token_bits(
    model: PreTrainedModel | SideBySide, documents: Sequence[HeldOutDocument], sequence_length: int
) -> list[list[float]]:
    """Bits of every text token of each document, in order, each read with what is before it in the pieces that bits per
    byte are measured on."""
    # Each document apart, so that its pieces come back in order: all but its last fill a row.
    packs = [pack([document], sequence_length) for document in documents]
    bits: list[list[float]] = [[] for _ in packs]
    for width in sorted({packed.input_ids_BS.shape[1] for packed in packs}):  # short ones have short rows
        alike = [number for number, packed in enumerate(packs) if packed.input_ids_BS.shape[1] == width]
        rows = [torch.cat([getattr(packs[number], field.name) for number in alike]) for field in fields(Packed)]
        nll_T = torch.cat([token_nll(model, part).double().cpu() for part in Packed(*rows).batches(MICRO_BATCH_TOKENS)])
        each = (nll_T / math.log(2)).split([int(packs[number].scored_BS.sum()) for number in alike])
        for number, of_one in zip(alike, each, strict=True):
            bits[number] = [round(value, 3) for value in of_one.tolist()]
    return bits
