"""What SFT and DPO will train on, counted from the text of their files before there is a tokenizer: about. Plain
Python."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from btx.data.conversations import Conversation, Preference, Row, data_files, read_rows
from btx.data.packed_conversations import best_fit_decreasing
from btx.errors import DataError
from btx.planning.data_look import BYTES_A_TOKEN
from btx.recipe.align import Alignment
from btx.recipe.schema import Recipe
from btx.recipe.training import Finetune

MESSAGE_TOKENS = 5
"""Of what a chat template writes around a message, about."""


def aligned_settings(recipe: Recipe) -> dict[str, Finetune]:
    """Stage of each section of `align` → its training settings in full, for about as many sequences as there will be;
    for one sequence where the files are not here."""
    length = recipe.data.sequence_length
    return {
        f"align/{name}": section.training(recipe.finetune, rows_about(recipe, name, section) or 1, length)
        for name, section in recipe.alignments.items()
    }


def rows_about(recipe: Recipe, name: str, section: Alignment) -> int | None:
    """Training sequences of a section, about; None where its files cannot be read: it is finished, or will be refused
    by who reads them to train."""
    try:
        lengths = _lengths(tuple(data_files(section, recipe.data.root, name)), section.PAIRS)
    except DataError:
        return None
    length = recipe.data.sequence_length
    return max(1, len(best_fit_decreasing([min(tokens, length) for tokens in lengths], length)))


@cache
def _lengths(files: tuple[Path, ...], pairs: bool) -> list[int]:
    return [_tokens(row) for row in read_rows(files, pairs=pairs)]


def _tokens(row: Row) -> int:
    answers: tuple[Conversation, ...] = (row.chosen, row.rejected) if isinstance(row, Preference) else (row,)
    return row.size // BYTES_A_TOKEN + MESSAGE_TOKENS * sum(1 + len(answer.messages) for answer in answers)


def aligned_notes(recipe: Recipe) -> list[str]:
    """What to know of the tokens that a plan tells, of sections that do not name them."""
    notes = []
    for name, section in recipe.alignments.items():
        if section.tokens is not None:
            continue
        if rows_about(recipe, name, section) is None:
            notes.append(f"align.{name}: its files cannot be read here, so its tokens are not known, and one sequence "
                         f"is counted")  # fmt: skip
        else:
            tokens = aligned_settings(recipe)[f"align/{name}"].tokens
            notes.append(f"align.{name}: about {tokens:,} tokens, at {BYTES_A_TOKEN} bytes of text each; they are "
                         f"counted when it begins")  # fmt: skip
    return notes
