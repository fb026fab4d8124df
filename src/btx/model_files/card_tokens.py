"""How many tokens a model has read, as its card says (README.md of its folder). Plain Python.

Cards say it in sentences ("trained on up to 9 trillion tokens", "Pretraining tokens: 600B"), in tables ("Training
Tokens": "4 Trillion"), and of several models at once ("the 27B model was trained with 14 trillion tokens, ... 1B with 2
trillion tokens"). They count contexts, batches and finetunings in tokens too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

LEAST, MOST = 1e8, 1e15
"""Fewer tokens than that are a context or a batch, unless the text says that they were read; more are a misprint."""
SAME_SIZE = 1.5
"""Parameters of a model over those that it is called by, or the other way round: Gemma 2 2B has 2.6 billion."""

SCALES = {"t": 1e12, "b": 1e9, "m": 1e6, "g": 1e9}
"""First letter of a scale → what it stands for."""
TAG = re.compile(r"</?\w[^<>\n]*>")
LINK = re.compile(r"\[([^\[\]\n]*)\]\([^)\[\n]*\)")
"""Neither reads over the beginning of the next one, so that a card of beginnings alone takes no quadratic time."""
QUANTITY = re.compile(
    r"(?<![\w.,])(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?(?:e\+?\d+)?)"
    r"(?:\s*\+?[\s-]*(trillions?|billions?|millions?|bn|trn|tn|[TBM]|tera|giga)(?=tokens?\b|(?<!tera)(?<!giga)(?!\w)))?",
    re.IGNORECASE,
)
WORD = r"(?!(?:parameters|params|models?|and|with)\b)[a-z][a-z-]*?"
THEN_TOKENS = re.compile(
    rf"\s*\+?(?:\s*\([^()]{{,30}}\))?(?:[\s-]+{WORD}){{0,2}}[\s-]*\(?\btokens?\b(?!\s*(?:per\b|/))|tokens?\b",
    re.IGNORECASE,
)
"""At most two words are between a number and its tokens, ..."""
THEN_KINDS = re.compile(
    rf"\s*\+?(?:[\s-]+{WORD},?){{1,4}}\s+and(?:[\s-]+{WORD}){{1,2}}\s+tokens?\b(?!\s*(?:per\b|/))", re.IGNORECASE
)
"""... or a list of kinds of text, where there are more than models have parameters."""
ABOUT = r"(?:up to|more than|over|about|around|approximately|approx\.|roughly|nearly|at least|only|just|[~≈>])?"
AFTER_TOKENS = re.compile(
    r"(?:(?:(?P<read>(?:\b|_)(?:(?:pre-?)?train(?:ing|ed)[\s_-]+tokens?"
    r"|tokens?[\s_-]+(?:seen|read|trained(?:[\s_-]+on)?)))|\btokens?\s+count)(?:\s*[:=|]|\s)"
    r"|(?:^(?:[-+#]\s*)?|#\s*|\b(?:number|amount)\s+of\s+|\btotal\s+)tokens?\s*[:=|])"
    rf"\s*{ABOUT}\s*$",
    re.IGNORECASE,
)
"""What a count stands behind, `read` where it says that they were."""
AFTER_READING = re.compile(
    rf"\b(?:train(?:ed|ing)\s+(?:on|for|over)(?:\s+a\s+total\s+of)?|saw|(?:has|have|had)\s+(?:only\s+)?(?:seen|read))"
    rf"\s+{ABOUT}\s*$",
    re.IGNORECASE,
)
"""Before a count of tokens: they were read, however few they are, ..."""
THEN_LENGTH = re.compile(
    r"(?:\s+(?:of|in|long|at|a|an|its|each|every|the|input|maximum|max))*[\s-]+"
    r"(?:contexts?|sequences?|windows?|lengths?|batch(?:es)?|inputs?|long|each|time|documents?|chunks?|blocks?)\b",
    re.IGNORECASE,
)
"""... but for what is said to be a length."""
NAMES_TOKENS = re.compile(r"\btokens?(?: count)?$", re.IGNORECASE)
LATER = re.compile(
    r"(?:fine-?tun\w*|post-?train\w*|\bsft\b|continu\w+[\s-]+(?:pre-?)?train\w*)(?:(?!pre-?train).)*$", re.IGNORECASE
)
"""Before a count: it is of what came after the pretraining."""
RATE = re.compile(r"(?:\bper|/|\$)\s*$", re.IGNORECASE)
"""Before a count: it is what a price or a speed is told for."""
OF_SIZE = re.compile(r"[\s(]*(?:for|in)\s+(?:the\s+)?", re.IGNORECASE)
EXPONENT = re.compile(r"<sup>\s*(\d{1,2})\s*</sup>", re.IGNORECASE)
POWER = re.compile(r"(?<![\w.,])(?:(\d+(?:\.\d+)?)\s*[×x·*]\s*)?10\s*(?:\^|\*\*)\s*\{?(\d{1,2})\}?(?!\w)")
SUPERSCRIPT = re.compile(r"(?<=10)[⁰¹²³⁴-⁹]{1,2}")
GROUPED = re.compile(r"(?<![\w.,])\d{1,3}(?:[_'. \u00a0\u202f]\d{3}){3,}(?![\w.,]?\d)")
IN_WORDS = {name: number for number, name in enumerate(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split(), 1)} | {
    "half a": 0.5, "a": 1, "eighteen": 18, "twenty": 20, "thirty": 30}  # fmt: skip
WRITTEN = re.compile(
    rf"\b({'|'.join(sorted(IN_WORDS, key=len, reverse=True))})[\s-]+(?=(?:tr|b)illions?\b)", re.IGNORECASE
)
NEAR = 200
"""Characters before and behind a number that are looked at."""
PARTS = re.compile(r"(?<=[.;!?])\s+(?=[A-Z])|\n\s*\n|\n(?=\s*(?:[-*#|]|\d+\.))")
"""Between sentences, items, headings and rows."""


class Count(NamedTuple):
    """Tokens that a card names."""

    tokens: float
    parameters: float | None
    """Of the model that they are said of; None where no size stands there."""


class Cell(NamedTuple):
    """A cell of a table: its counts are of the model that the row's other cells, or else the column, are about."""

    text: str
    size: float | None
    """The first number of parameters in it. Looked for once a cell, so that a long row takes no quadratic time."""

    @classmethod
    def of(cls, text: str) -> Cell:
        """The cell of this text."""
        return cls(text.strip(), _size(text))


def card_tokens(card: str, parameters: float) -> tuple[float, list[float]]:
    """The most tokens that a card says of a model, and all different numbers that it may be.

    What it says of models of another size does not count, unless it says nothing else.

    Returns:
        (0, []) if the card names none.
    """
    counts = list(_counts(card))
    of_its_size = [each.tokens for each in counts
                   if each.parameters is None or 1 / SAME_SIZE < each.parameters / parameters < SAME_SIZE]  # fmt: skip
    tokens = sorted(set(of_its_size or [each.tokens for each in counts]))
    return (tokens[-1], tokens) if tokens else (0.0, [])


def _counts(card: str) -> Iterator[Count]:
    text = LINK.sub(r"\1", TAG.sub(" ", _in_digits(card))).replace("*", "")
    columns: list[Cell] = []
    for part in PARTS.split(text):
        row = part.strip()
        if not row.startswith("|"):
            columns = []
            yield from _counts_in(" ".join(part.split()))
            continue
        cells = [Cell.of(text) for text in row.removeprefix("|").removesuffix("|").split("|")]
        sized = [(number, cell.size) for number, cell in enumerate(cells) if cell.size][:2]  # of them one is another
        for number, cell in enumerate(cells):
            column = columns[number] if number < len(columns) else Cell("", None)
            size = next((size for other, size in sized if other != number), column.size)
            first = cells[:1] if number else cells[1:2]
            label = next((name.text for name in (column, *first) if NAMES_TOKENS.search(name.text[-NEAR:])), "")
            for count in _counts_in(f"{label[-NEAR:]}: {cell.text}"):
                yield Count(count.tokens, count.parameters or size)
        columns = columns or cells


def _in_digits(card: str) -> str:
    """Powers of ten, numbers in words and digits in groups as the numbers that they are."""
    text = SUPERSCRIPT.sub(lambda match: f"^{unicodedata.normalize('NFKC', match[0])}", EXPONENT.sub(r"^\1", card))
    text = POWER.sub(lambda match: f"{match[1] or 1}e{match[2]}", text)
    text = WRITTEN.sub(lambda match: f"{IN_WORDS[' '.join(match[1].lower().split())]} ", text)
    return GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), text)


def _counts_in(sentence: str) -> Iterator[Count]:
    size = None
    for quantity in QUANTITY.finditer(sentence):
        value, scale = _value(quantity), (quantity[2] or "")[:1].lower()
        before = sentence[max(0, quantity.start() - NEAR) : quantity.start()]
        behind = sentence[quantity.end() : quantity.end() + NEAR]
        then = THEN_TOKENS.match(behind) or (THEN_KINDS.match(behind) if value >= 1e12 else None)
        label = AFTER_TOKENS.search(before)
        if then or label:
            is_read = (label and label["read"]) or (
                then and AFTER_READING.search(before) and not THEN_LENGTH.match(behind, then.end())
            )
            if (1 if is_read else LEAST) <= value <= MOST and not (LATER.search(before) or RATE.search(before)):
                said = OF_SIZE.match(behind, then.end()) if then else None
                yield Count(value, (_size_at(behind[said.end() :]) if said else None) or size)
        elif scale in ("b", "m"):
            size = value


def _value(quantity: re.Match[str]) -> float:
    in_thousands = re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", quantity[1])
    number = float(quantity[1].replace(",", "" if in_thousands else "."))
    value = number * SCALES.get((quantity[2] or "")[:1].lower(), 1.0)
    return float(round(value)) if value < MOST else value  # 4.1 trillion are no fraction of a token less


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
