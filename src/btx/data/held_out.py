"""What models are measured on: which held-out documents, and how they are packed into rows.

Shape letters: B rows, S sequence, N documents.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from btx.data.mixture import NO_LABEL
from btx.data.packed_conversations import best_fit_decreasing
from btx.data.token_files import TokenFile
from btx.data.token_texts import decoded
from btx.errors import DataError
from btx.process import note_progress
from btx.recipe.mixtures import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from btx.recipe.schema import Recipe

PADDING = -1


@dataclass(frozen=True)
class HeldOutDocument:
    """One held-out document."""

    tokens: np.ndarray
    """Token ids: the separator, then the text; no end-of-text token."""
    bytes: int
    """UTF-8 bytes of the text."""

    def start(self, tokens: int) -> HeldOutDocument:
        """The first tokens of the text, where nothing is counted by its bytes: they stay those of the whole."""
        return HeldOutDocument(self.tokens[: 1 + tokens], self.bytes)


@dataclass(frozen=True)
class Packed:
    """Pieces of documents side by side in rows. Attention stops between pieces: their positions start at zero."""

    input_ids_BS: Tensor
    labels_BS: Tensor
    """Token that follows each position, already shifted; NO_LABEL at the end of a piece and in padding."""
    position_ids_BS: Tensor
    """Position in the piece; 0 in padding."""
    document_ids_BS: Tensor
    """Index of the document; PADDING where there is none."""
    bytes_N: Tensor
    """UTF-8 bytes of each document."""

    @property
    def scored_BS(self) -> Tensor:
        """True where a token is predicted that counts."""
        return self.labels_BS != NO_LABEL

    @property
    def text_BS(self) -> Tensor:
        """True at every token of the text once: not in padding, at separators and where a piece starts."""
        return (self.document_ids_BS != PADDING) & (self.position_ids_BS > 0)

    def batches(self, tokens: int) -> Iterator[Packed]:
        """The rows in groups of at most `tokens` positions, one row at least."""
        rows = max(1, tokens // self.input_ids_BS.shape[1])
        for start in range(0, len(self.input_ids_BS), rows):
            note_progress()
            yield self.select(slice(start, start + rows))

    def select(self, rows_B: Tensor | slice) -> Packed:
        """Some rows: a mask, indices or a slice."""
        return Packed(self.input_ids_BS[rows_B], self.labels_BS[rows_B], self.position_ids_BS[rows_B],
                      self.document_ids_BS[rows_B], self.bytes_N)  # fmt: skip

    def fingerprint(self) -> str:
        """Hash of every token and byte count: equal fingerprints give equal results."""
        digest = hashlib.sha256(repr(tuple(self.input_ids_BS.shape)).encode())
        for tensor in (self.input_ids_BS, self.labels_BS, self.position_ids_BS, self.document_ids_BS, self.bytes_N):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def held_out_documents(
    run_folder: Path, recipe: Recipe, domain: str, tokens: int, *, documents: int | None = None
) -> list[HeldOutDocument]:
    """Held-out documents of a domain, its sources in proportion to their weights.

    Whole documents, evenly spread over each source's held-out file; always the same ones for the same files.

    Args:
        tokens: at most so many in all, but at least one document a source.
        documents: at most so many in all (rounded up for each source); None: as many as `tokens` allow.

    Raises:
        DataError: a token file is missing or broken, or no source of the domain has held-out documents.
    """
    files = [
        (TokenFile.open(run_folder / "data" / path / "val"), weight)
        for _, path, weight in resolve(recipe, {domain: 1.0})
    ]
    files = [(file, weight) for file, weight in files if file.documents]
    if not files:
        raise DataError(f"domain {domain!r}: none of its sources has held-out documents; give the domain `held_out` "
                        f"files, more text, or a larger data.held_out")  # fmt: skip
    total = sum(weight for _, weight in files)
    return [
        _document(file, number)
        for file, weight in files
        for number in _selected(file, int(tokens * weight / total),
                                None if documents is None else math.ceil(documents * weight / total))
    ]  # fmt: skip


def shortened(document: HeldOutDocument, tokens: int, tokenizer: PreTrainedTokenizerBase) -> HeldOutDocument:
    """The first tokens of a document's text, with the bytes that they stand for."""
    if len(document.tokens) <= 1 + tokens:
        return document
    ids = document.tokens[: 1 + tokens]
    return HeldOutDocument(ids, max(1, len(decoded(tokenizer, ids[1:]).encode())))


def _document(file: TokenFile, number: int) -> HeldOutDocument:
    start, end = file.document_starts[number], file.document_starts[number + 1] - file.trailing_eos
    return HeldOutDocument(file.tokens[start:end].astype(np.int64), int(file.document_bytes[number]))


def _selected(file: TokenFile, tokens: int, documents: int | None) -> list[int]:
    """Documents of `file`, at most `documents`, with at most `tokens` tokens but at least one document, ascending.

    They are taken with a stride of the golden ratio, so that any number of them is evenly spread over the file.
    """
    n = file.documents
    stride = next(step for step in range(max(1, round(n * 0.618)), n + 1) if math.gcd(step, n) == 1)
    lengths = np.diff(file.document_starts)
    chosen: list[int] = []
    used = 0
    for i in range(n if documents is None else min(n, documents)):
        number = i * stride % n
        used += int(lengths[number])
        if chosen and used > tokens:
            break
        chosen.append(number)
    return sorted(chosen)


def pack(documents: Sequence[HeldOutDocument], sequence_length: int, *, apart: bool = False) -> Packed:
    """Cut documents into pieces and lay these into as few rows as best-fit decreasing finds.

    The first piece starts with the separator. Each later one starts, as training sequences do in the middle of a
    document, with nothing before it but the last token of the piece before; so every text token is scored exactly
    once. Feed the rows with their `position_ids`, no attention mask and no cache: only then do transformers' models
    keep the pieces apart.

    Args:
        documents: at least one.
        sequence_length: positions a row has at most, at least 2.
        apart: one piece a row, the longest first: for models that do not keep pieces of a row apart.
    """
    pieces = [
        (number, document.tokens[start : start + sequence_length])
        for number, document in enumerate(documents)
        for start in range(0, len(document.tokens) - 1, sequence_length - 1)
    ]
    lengths = [len(piece) for _, piece in pieces]
    alone = [[i] for i in sorted(range(len(pieces)), key=lambda i: -lengths[i])]
    rows = alone if apart else best_fit_decreasing(lengths, sequence_length)
    width = max(sum(len(pieces[i][1]) for i in row) for row in rows)
    shape = (len(rows), width)
    input_ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels, document_ids = torch.full(shape, NO_LABEL), torch.full(shape, PADDING)
    for r, row in enumerate(rows):
        start = 0
        for number, piece in (pieces[i] for i in row):
            end = start + len(piece)
            tokens = torch.from_numpy(piece)
            input_ids[r, start:end] = tokens
            labels[r, start : end - 1] = tokens[1:]
            positions[r, start:end] = torch.arange(len(piece))
            document_ids[r, start:end] = number
            start = end
    return Packed(input_ids, labels, positions, document_ids, torch.tensor([document.bytes for document in documents]))
