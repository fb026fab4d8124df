"""The mixed set: held-out documents that switch domain in the middle, because separable domains flatter models that
choose by the look of a text.

They fit one training sequence wherever possible, so that a model sees both sides of the switch.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from itertools import combinations, cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from btx.data.held_out import HeldOutDocument, held_out_documents
from btx.data.token_files import DocumentEncoder
from btx.data.token_texts import UNFINISHED, decoded
from btx.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from btx.recipe.schema import Recipe

JOINT = "\n\n"
"""Between the halves."""
LEAST_HALF = 1 / 3
"""Share of a text that each part has at least where it is cut at a line end."""
ROOM = 8
"""Tokens of a training sequence left free for the joint and the separator."""


def mixed_documents(run_folder: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[HeldOutDocument]:
    """`evaluate.mixed.documents` documents of the recipe's kind, always the same ones.

    Raises:
        DataError: a domain has no held-out document of two words.
    """
    mixed = recipe.evaluate.mixed
    if mixed.kind == "generated":
        from btx.data.domains.mixed_text import mixed_texts

        texts = mixed_texts(recipe.rng_seed, mixed.documents, recipe.data.held_out)
    else:
        halves = math.ceil(2 * mixed.documents / len(recipe.data.domains))
        halved = texts_to_halve(run_folder, recipe, tokenizer, recipe.data.domains, halves)
        for domain in (domain for domain, of_it in halved.items() if not of_it):
            raise DataError(f"evaluate.mixed: domain {domain!r} has no held-out document of two words to halve; "
                            f"leave evaluate.mixed out")  # fmt: skip
        texts = joined_halves(halved, mixed.documents)
    encoder = DocumentEncoder(tokenizer)
    return [HeldOutDocument(np.array(encoder.beginning(text), np.int64), len(text.encode())) for text in texts]


def joined_halves(texts: dict[str, list[str]], count: int) -> list[str]:
    """First halves of documents of one domain followed by second halves of another's.

    Every pair of domains comes equally often (up to one), each of the two as often first as second (up to one), and a
    domain's documents are used in turn.

    Args:
        texts: domain → its documents, one at least.
    """
    pairs, joined = list(combinations(texts, 2)), []
    halves = {domain: cycle(map(split_in_the_middle, of_it)) for domain, of_it in texts.items()}
    for number in range(count):
        turn, place = divmod(number, len(pairs))
        first, second = pairs[place] if (turn + place) % 2 == 0 else pairs[place][::-1]
        joined.append(next(halves[first])[0] + JOINT + next(halves[second])[1])
    return joined


def split_in_the_middle(text: str) -> tuple[str, str]:
    """Two halves of a text, cut at the line end nearest to the middle, else at the nearest white space.

    A line end is taken if neither part gets less than a third. Without white space inside, both halves are the text.
    """
    text = text.strip()
    for pattern, margin in ((r"\s*\n", LEAST_HALF), (r"\s+", 0.0)):
        cuts = [gap for gap in re.finditer(pattern, text)
                if margin * len(text) <= gap.start() and gap.end() <= (1 - margin) * len(text)]  # fmt: skip
        if cuts:
            nearest = min(cuts, key=lambda gap: abs(gap.start() + gap.end() - len(text)))
            return text[: nearest.start()], text[nearest.end() :]
    return text, text


def texts_to_halve(
    run_folder: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, domains: Iterable[str], halves: int
) -> dict[str, list[str]]:
    """Held-out documents of some domains as text, those of two words at least: `halves` of each if there are so many;
    of longer ones the middle, so that two halves fit one training sequence."""
    # Halves may have two thirds of their texts, and two of them should fit.
    longest = int((recipe.data.sequence_length - ROOM) / (2 - 2 * LEAST_HALF))
    texts: dict[str, list[str]] = {}
    for domain in domains:
        texts[domain] = []
        for document in held_out_documents(run_folder, recipe, domain, sys.maxsize, documents=halves):
            ids, surplus = document.tokens[1:], max(0, len(document.tokens) - 1 - longest)
            ids = ids[surplus // 2 : surplus // 2 + longest]
            text = decoded(tokenizer, ids).strip(UNFINISHED)
            if surplus:
                text = re.sub(r"\A\S*\s+|\s+\S*\Z", "", text)  # a word may have been cut at either end
            if len(text.split()) > 1:
                texts[domain].append(text)
    return texts
