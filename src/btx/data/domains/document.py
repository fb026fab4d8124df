"""What the generators yield, and how their text is divided between train and held-out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

Split = Literal["train", "val"]
DocumentGenerator = Callable[[Split, int, int, float], "Iterator[Document]"]
"""(split, rng_seed, max_bytes, held_out) -> documents."""
QuestionGenerator = Callable[[int, int], "list[Question]"]
"""(rng_seed, count) -> questions."""


@dataclass(frozen=True)
class Document:
    """One text; all documents of a `group` are on the same side of the split."""

    text: str
    group: str


@dataclass(frozen=True)
class Question:
    """A prompt for a greedy continuation, the gold answer, and prompt + gold continuation."""

    prompt: str
    answer: str
    full: str


def position(name: str, rng_seed: int) -> float:
    """A place in [0, 1) that depends on nothing but the name and the rng seed: splits are cut along it."""
    digest = blake2b(f"{rng_seed}/{name}".encode(), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def byte_budget(split: Split, max_bytes: int, held_out: float) -> int:
    """Bytes of UTF-8 text that one side of the split may have."""
    val_bytes = round(max_bytes * held_out)
    return val_bytes if split == "val" else max_bytes - val_bytes


def up_to(documents: Iterable[Document], budget: int) -> Iterator[Document]:
    """The documents before the one that would exceed `budget` bytes; at least the first."""
    used = 0
    for document in documents:
        size = len(document.text.encode())
        if used and used + size > budget:
            return
        used += size
        yield document


def held_out_groups(documents: list[Document], rng_seed: int, held_out: float) -> set[str]:
    """Groups of a finite corpus that `split_by_group` holds out."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.group] = sizes.get(document.group, 0) + len(document.text.encode())
    total = sum(sizes.values())
    held: set[str] = set()
    held_bytes = 0
    for group in sorted(sizes, key=lambda group: position(group, rng_seed)):
        if held_bytes >= total * held_out:
            break
        held.add(group)
        held_bytes += sizes[group]
    return held


def split_by_group(
    documents: list[Document], split: Split, rng_seed: int, max_bytes: int, held_out: float
) -> Iterator[Document]:
    """One side of a finite corpus, shuffled; whole groups are held out, in the order of their `position`.

    The groups held out are the same whatever `max_bytes`, so a larger corpus never trains on text a smaller one
    held out.
    """
    total = sum(len(document.text.encode()) for document in documents)
    held = held_out_groups(documents, rng_seed, held_out)
    side = [document for document in documents if (document.group in held) == (split == "val")]
    random.Random(f"{rng_seed}/{split}").shuffle(side)
    return up_to(side, byte_budget(split, min(max_bytes, total), held_out))
