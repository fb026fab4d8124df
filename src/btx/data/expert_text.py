"""Text of every expert's domain as rows of tokens: what routers that need text are computed from.

Shape letters: B rows, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from btx.data.document_files import find_files, read
from btx.data.samples import open_mixture
from btx.data.token_files import DocumentEncoder
from btx.errors import DataError
from btx.process import note_progress
from btx.recipe.data import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from btx.recipe.schema import Recipe

SEQUENCE_LENGTH = 512
"""Tokens a row of text from files."""
ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class TextRows:
    """Documents one after the other, cut into rows; attention stops where `position_ids` restart."""

    source: str
    """Where the text comes from."""
    input_ids_BS: np.ndarray
    position_ids_BS: np.ndarray
    """Tokens since the document's start, or since the row's."""

    @property
    def tokens(self) -> int:
        """Tokens that count: all but those at position 0, which are document separators for the most part."""
        return int((self.position_ids_BS > 0).sum())

    def batches(self, rows: int = ROWS_AT_ONCE) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Input ids and position ids of a few rows at a time."""
        for start in range(0, len(self.input_ids_BS), rows):
            note_progress()
            part = slice(start, start + rows)
            yield self.input_ids_BS[part], self.position_ids_BS[part]


def text_from_files(
    paths: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    sequence_length: int = SEQUENCE_LENGTH,
) -> dict[str, TextRows]:
    """Rows of the first documents of each expert's files.

    Args:
        paths: expert name → file, folder or glob in the formats that recipes read (`btx.data.document_files`).
        tokens: tokens of each expert, at most; reading stops there.

    Raises:
        DataError: no such file, broken, or too short for two tokens.
    """
    encoder = DocumentEncoder(tokenizer)
    rows = {}
    for name, path in paths.items():
        documents = read(find_files(str(path), None), Source(path=str(path)))
        rows[name] = _packed(str(path), _encoded(documents, encoder), tokens, sequence_length)
        if not rows[name].tokens:
            raise DataError(f"text of expert {name}: {path}: fewer than two tokens")
    return rows


def text_from_run(
    run_folder: Path, recipe: Recipe, *, tokens: int, known_as: Mapping[str, str] | None = None
) -> dict[str, TextRows]:
    """Rows of each expert's own domain, without replay text, from the run's token files; the generalist's domain is
    the general one. `known_as` and what is raised: as `open_mixture`."""
    rows = {}
    for name, domain in zip(recipe.member_names, [*recipe.train.domains, recipe.data.general], strict=False):
        mixture = open_mixture(run_folder / "data", recipe, {domain: 1.0}, known_as)
        batch = mixture.batch(0, max(1, tokens // mixture.sequence_length))
        rows[name] = TextRows(f"domain {domain}", batch.input_ids, batch.position_ids)
    return rows


def _encoded(documents: Iterable[str], encoder: DocumentEncoder) -> Iterator[list[int]]:
    documents = iter(documents)
    while some := list(islice(documents, 64)):
        yield from encoder(some)


def _packed(source: str, documents: Iterable[list[int]], tokens: int, sequence_length: int) -> TextRows:
    """Documents laid one after the other until there are `tokens` tokens, cut into full rows (one shorter row if the
    text is shorter)."""
    ids: list[int] = []
    positions: list[int] = []
    for document in documents:
        ids += document
        positions += range(len(document))
        if len(ids) >= tokens:
            break
    width = max(1, min(sequence_length, len(ids), tokens))
    end = min(len(ids), tokens) // width * width
    ids_BS, positions_BS = (np.array(values[:end], np.int64).reshape(-1, width) for values in (ids, positions))
    return TextRows(source, ids_BS, np.minimum(positions_BS, np.arange(width)))
