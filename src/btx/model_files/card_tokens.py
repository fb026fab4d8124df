"""How many tokens a model has read, as its card says (README.md of its folder). Plain Python.

Cards say it in sentences ("trained on up to 9 trillion tokens", "Pretraining tokens: 600B"), in tables ("Training
Tokens": "4 Trillion"), and of several models at once ("the 27B model was trained with 14 trillion tokens, ... 1B with 2
trillion tokens"). They count contexts, batches and finetunings in tokens too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

LEAST, MOST = 1e8, 1e15
"""Fewer tokens than that are a context or a batch, more a misprint."""
SAME_SIZE = 1.5
"""Parameters of a model over those that it is called by, or the other way round: Gemma 2 2B has 2.6 billion."""

SCALES = {"t": 1e12, "b": 1e9, "m": 1e6, "g": 1e9}
"""First letter of a scale → what it stands for."""
TAG = re.compile(r"</?\w[^<>\n]*>")
LINK = re.compile(r"\[([^\[\]\n]*)\]\([^)\[\n]*\)")
"""Neither reads over the beginning of the next one, so that a card of beginnings alone takes no quadratic time."""
QUANTITY = re.compile(
    r"(?<![\w.,])(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?(?:e\+?\d+)?)"
    r"(?:\s*\+?[\s-]*(trillion|billion|million|bn|[TBM]|tera|giga)(?=tokens?\b|(?<!tera)(?<!giga)(?!\w)))?",
    re.IGNORECASE,
)
THEN_TOKENS = re.compile(
    r"\+?(?:[\s-]+(?!parameters\b|params\b|models?\b|and\b|with\b)[a-z][a-z-]*?){0,2}[\s-]*\btokens?\b(?!\s*(?:per\b|/))"
    r"|tokens?\b",
    re.IGNORECASE,
)
AFTER_TOKENS = re.compile(
    r"(?:\b(?:pre-?)?train(?:ing|ed)\s+tokens?|\btokens?\s+(?:seen|read|count|trained(?:\s+on)?)|^tokens?)"
    r"\s*[:=|]\s*(?:up to|more than|over|about|around|nearly|[~≈>])?\s*$",
    re.IGNORECASE,
)
NAMES_TOKENS = re.compile(r"\btokens?(?: count)?$", re.IGNORECASE)
LATER = re.compile(
    r"(?:fine-?tun\w*|post-?train\w*|\bsft\b|continu\w+[\s-]+pre-?train\w*)(?:(?!pre-?train).)*$", re.IGNORECASE
)
"""Before a count: it is of what came after the pretraining."""
OF_SIZE = re.compile(r"[\s(]*(?:for|in)\s+(?:the\s+)?", re.IGNORECASE)
NEAR = 200
"""Characters before and behind a number that are looked at."""
PARTS = re.compile(r"(?<=[.;!?])\s+(?=[A-Z])|\n\s*\n|\n(?=\s*(?:[-*#|]|\d+\.))")
"""Between sentences, items, headings and rows."""


class Count(NamedTuple):
    """Tokens that a card names."""

    tokens: float
    parameters: float | None
    """Of the model that they are said of; None where no size stands there."""


def card_tokens(card: str, parameters: float) -> tuple[float, list[float]]:
    """The most tokens that a card says of a model, and all different numbers that it may be.

    What it says of models of another size does not count, unless it says nothing else.

    Args:
        card: text of README.md.
        parameters: of the model.

    Returns:
        (0, []) if the card names none.
    """
    counts = list(_counts(card))
    own = [each.tokens for each in counts if each.parameters is None or _alike(each.parameters, parameters)]
    tokens = sorted(set(own or [each.tokens for each in counts]))
    return (tokens[-1], tokens) if tokens else (0.0, [])


def _alike(size: float, parameters: float) -> bool:
    return 1 / SAME_SIZE < size / parameters < SAME_SIZE


def _counts(card: str) -> Iterator[Count]:
    text = LINK.sub(r"\1", TAG.sub(" ", card)).replace("*", "")
    columns: list[str] = []
    for part in PARTS.split(text):
        row = part.strip()
        if not row.startswith("|"):
            columns = []
            yield from _counts_in(" ".join(part.split()))
            continue
        cells = [cell.strip() for cell in row.removeprefix("|").removesuffix("|").split("|")]
        for number, cell in enumerate(cells):
            column = columns[number] if number < len(columns) else ""
            yield from _counts_in_cell(cell, column, [other for other in cells if other is not cell])
        columns = columns or cells


def _counts_in_cell(cell: str, column: str, others: list[str]) -> Iterator[Count]:
    """Counts in a table's cell: of the model that the row's other cells, or else the column, are about."""
    size = next(filter(None, map(_size, [*others, column])), None)
    label = next((name for name in (column, *others[:1]) if NAMES_TOKENS.search(name)), "")
    for count in _counts_in(f"{label}: {cell}"):
        yield Count(count.tokens, count.parameters or size)


def _counts_in(sentence: str) -> Iterator[Count]:
    size = None
    for quantity in QUANTITY.finditer(sentence):
        value, scale = _value(quantity), (quantity[2] or "")[:1].lower()
        before = sentence[max(0, quantity.start() - NEAR) : quantity.start()]
        behind = sentence[quantity.end() : quantity.end() + NEAR]
        then = THEN_TOKENS.match(behind)
        if then or AFTER_TOKENS.search(before):
            if LEAST <= value <= MOST and not LATER.search(before):
                said = OF_SIZE.match(behind, then.end()) if then else None
                yield Count(value, (_size_at(behind[said.end() :]) if said else None) or size)
        elif scale in ("b", "m"):
            size = value


def _value(quantity: re.Match[str]) -> float:
    in_thousands = re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", quantity[1])
    number = float(quantity[1].replace(",", "" if in_thousands else "."))
    return number * SCALES.get((quantity[2] or "")[:1].lower(), 1.0)


def _size(text: str) -> float | None:
    """The first number of parameters in a text."""
    return next((size for quantity in QUANTITY.finditer(text) if (size := _size_of(quantity, text))), None)


def _size_at(text: str) -> float | None:
    """The number of parameters that a text begins with."""
    quantity = QUANTITY.match(text)
    return _size_of(quantity, text) if quantity else None


def _size_of(quantity: re.Match[str], text: str) -> float | None:
    is_size = (quantity[2] or "")[:1].lower() in ("b", "m") and not THEN_TOKENS.match(text, quantity.end())
    return _value(quantity) if is_size else None
