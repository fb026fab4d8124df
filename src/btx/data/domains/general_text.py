"""The general domain: prose that every Python of one version has, whatever is installed beside it.

Docstrings of the standard library and the language reference behind `help()`. Whole modules and topics are held out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache

from btx.data.domains.document import Document, Split, split_by_group
from btx.data.domains.stdlib_sources import standard_library

LEAST_LETTERS = 0.85
"""Share of letters and spaces below which a paragraph is no prose but a table, links or code."""
SHORTEST_PARAGRAPH = 40
"""Characters; shorter ones are mostly headings."""
DOCUMENT_BYTES = 2_000
"""Paragraphs of one source are joined to documents of about so many bytes."""
CODE_LINE = re.compile(r"^\s*(>>> |\.\.\. |\$ |def .*\(|class .*:$|@\w|import \w+$|from \S+ import )", re.MULTILINE)
"""Begins a line of code: paragraphs with one are left out."""


def documents(split: Split, rng_seed: int, max_bytes: int, held_out: float) -> Iterator[Document]:
    """Passages of prose of about 2 kB in random order. The corpus is finite: about 1.5 MB."""
    return split_by_group(passages(), split, rng_seed, max_bytes, held_out)


@cache
def passages() -> list[Document]:
    """Every paragraph of every source once (up to white space and case), joined to passages source by source."""
    seen: set[str] = set()
    result = []
    for group, texts in sources():
        paragraphs = []
        for paragraph in (paragraph for text in texts for paragraph in prose(text)):
            key = " ".join(paragraph.lower().split())
            if key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        result += [Document(text, group) for text in _joined(paragraphs)]
    return result


def sources() -> Iterator[tuple[str, Iterable[str]]]:
    """(group, texts) of everything there is, in a fixed order."""
    yield from reference()
    for file in standard_library():
        yield file.path, file.docstrings


def reference() -> Iterator[tuple[str, list[str]]]:
    """The language reference, one group a topic; some minimal Python installations come without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield f"topic {name}", [text]


def prose(text: str) -> list[str]:
    """The paragraphs of a text that read as prose, without their common indentation."""
    paragraphs = (paragraph.strip("\n").rstrip() for paragraph in re.split(r"\n\s*\n", text))
    return [paragraph for paragraph in paragraphs if _is_prose(paragraph)]


def _is_prose(paragraph: str) -> bool:
    letters = sum(map(str.isalpha, paragraph)) + paragraph.count(" ") + paragraph.count("\n")
    long_enough = len(paragraph) >= SHORTEST_PARAGRAPH
    return long_enough and letters >= LEAST_LETTERS * len(paragraph) and not CODE_LINE.search(paragraph)


def _joined(paragraphs: list[str]) -> Iterator[str]:
    passage: list[str] = []
    for paragraph in paragraphs:
        passage.append(paragraph)
        if sum(map(len, passage)) >= DOCUMENT_BYTES:
            yield "\n\n".join(passage)
            passage = []
    if passage:
        yield "\n\n".join(passage)
