"""The general domain: prose that every Python installation has.

Docstrings of the standard library, the language reference behind `help()`, licence texts, and the descriptions and
licences of the installed packages. Whole modules, topics and packages are held out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path

from btx.data.domains.document import Document, Split, split_by_group
from btx.data.domains.stdlib_sources import standard_library

LICENCES = Path("/usr/share/common-licenses")
"""Where Debian keeps licence texts; other systems do without."""
LEAST_LETTERS = 0.85
"""Share of letters and spaces below which a paragraph is no prose but a table, links or code."""
SHORTEST_PARAGRAPH = 40
"""Characters; shorter ones are mostly headings."""
PACKAGE_PARAGRAPHS = 60
"""Paragraphs taken from one package at most: some descriptions are endless change logs."""
DOCUMENT_BYTES = 2_000
"""Paragraphs of one source are joined to documents of about so many bytes."""
CODE_LINE = re.compile(r"^\s*(>>> |\.\.\. |\$ |def .*\(|class .*:$|@\w|import \w+$|from \S+ import )", re.MULTILINE)
"""Begins a line of code: paragraphs with one are left out."""
LICENCE_FILE = re.compile(r"LICEN[CS]E|COPYING|NOTICE|AUTHORS", re.IGNORECASE)


def documents(split: Split, rng_seed: int, max_bytes: int, held_out: float) -> Iterator[Document]:
    """Passages of prose of about 2 kB in random order. The corpus is finite: about 2 MB, more with more packages."""
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
    yield from licences()
    for distribution in sorted(distributions(), key=lambda distribution: distribution.name.lower()):
        paragraphs = [paragraph for text in package_texts(distribution) for paragraph in prose(text)]
        yield f"package {distribution.name}", paragraphs[:PACKAGE_PARAGRAPHS]


def reference() -> Iterator[tuple[str, list[str]]]:
    """The language reference, one group a topic; some minimal Python installations come without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield f"topic {name}", [text]


def licences() -> Iterator[tuple[str, list[str]]]:
    """The system's licence texts, each once: several names may lead to one file."""
    for path in sorted({path.resolve() for path in LICENCES.glob("*")}):
        yield f"licence {path.name}", [path.read_text(encoding="utf-8", errors="replace")]


def package_texts(distribution: Distribution) -> list[str]:
    """A package's description and licence files, as far as they can be read."""
    _, _, description = (distribution.read_text("METADATA") or "").replace("\r\n", "\n").partition("\n\n")
    files = sorted(str(file) for file in distribution.files or () if LICENCE_FILE.search(file.name))
    texts = [Path(str(distribution.locate_file(file))) for file in files]
    return [description, *(path.read_text(encoding="utf-8", errors="replace") for path in texts if path.is_file())]


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
