"""What an alignment trains on: the conversations or pairs of a section, as the model's chat template writes them.

The seed model's stage tries the template before anything is trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from btx.data.chat_text import Encoded, encode, with_template
from btx.data.conversations import Preference, data_files, read_rows
from btx.data.packed_conversations import PackedConversations, PackedPairs, fitted
from btx.data.token_files import DocumentEncoder
from btx.models.loading import load_tokenizer
from btx.process import Log
from btx.recipe.align import Alignment
from btx.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIED = 100
"""Conversations of each section whose template is tried before anything is trained."""


def check_templates(run: RunFolder, folder: Path) -> None:
    """Try the chat template in a folder on the first conversations that the run will be aligned with.

    Raises:
        DataError: as `packed`, but for what is too long.
    """
    if not run.graph.aligned:
        return
    tokenizer = load_tokenizer(folder)
    with_template(tokenizer)
    for stage in run.graph.aligned:
        name = stage.name.removeprefix("align/")
        section = run.recipe.alignments[name]
        if run.state(stage) != "done":
            files = data_files(section, run.recipe.data.root, name)
            for _ in itertools.islice(_encoded(section, files, tokenizer), TRIED):
                pass


def packed(
    run: RunFolder, name: str, section: Alignment, tokenizer: PreTrainedTokenizerBase, log: Log
) -> PackedConversations:
    """The training sequences of a section; says what they hold.

    Raises:
        DataError: a line is broken, too long, or nothing the chat template takes.
    """
    recipe = run.recipe
    length, pairs = recipe.data.sequence_length, section.PAIRS
    files = data_files(section, recipe.data.root, name)
    fit = fitted(_encoded(section, files, tokenizer), length, section.too_long, where=f"align.{name}")
    kind = PackedPairs if pairs else PackedConversations
    samples = kind(fit.groups, length, recipe.rng_seed)
    learnt = sum(int(each.is_answer_N.sum()) for group in fit.groups for each in group)
    log(f"{fit.told('pairs' if pairs else 'conversations')}, {learnt:,} tokens of answers, in {len(samples.rows):,} "
        f"sequences of {length:,}, {samples.filled:.0%} full")  # fmt: skip
    return samples


def _encoded(
    section: Alignment, files: list[Path], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Encoded, ...]]:  # fmt: skip
    separator = DocumentEncoder(tokenizer).separator
    for row in read_rows(files, pairs=section.PAIRS):
        answers = (row.chosen, row.rejected) if isinstance(row, Preference) else (row,)
        yield tuple(encode(tokenizer, answer, separator) for answer in answers)


def ends_of_turns(samples: PackedConversations, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that the template has for the end of an answer: added ones that answers end with."""
    last = {int(each.ids_N[-1]) for group in samples.groups for each in group}
    return last & tokenizer.added_tokens_decoder.keys()
