"""The code domain: the interpreter's own standard library without its docstrings; whole files are held out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from btx.data.domains.document import Document, Split, split_by_group
from btx.data.domains.stdlib_sources import standard_library

SHORTEST = 200
"""Bytes; shorter pieces (empty packages, lone imports) are left out."""


def documents(split: Split, rng_seed: int, max_bytes: int, held_out: float) -> Iterator[Document]:
    """Runs of definitions, 2-4 kB each, in random order. The corpus is finite: about 5 MB."""
    return split_by_group(pieces_of_code(), split, rng_seed, max_bytes, held_out)


@cache
def pieces_of_code() -> list[Document]:
    """Every piece of every module once, in the order of the paths."""
    pieces: dict[str, str] = {}
    for file in standard_library():
        for piece in file.pieces:
            pieces.setdefault(piece.strip("\n"), file.path)
    return [Document(text, path) for text, path in pieces.items() if len(text) >= SHORTEST]
