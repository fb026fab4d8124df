"""Sources → documents: reads files, hub datasets and generators, and divides each into train and held-out.

Which documents are held out (`val`), in this order:

1. `held_out` of the domain: those documents. They belong to the domain's first source; the others have no `val`.
2. A generator makes both sides itself.
3. A folder or glob with files (or subfolders) named train* and files named val*, valid*, test* or heldout*: the latter.
4. Otherwise each document is held out if a hash of its text falls below `data.held_out`. The hash knows nothing of the
   source, so equal documents are on the same side wherever they come from.

Documents are Unicode strings, whole and unchanged, except: white-space-only ones are skipped, .txt documents lose the
line ends around them, and exact duplicates within a source (or of its held-out documents) are dropped. Remembering
them takes about 100 bytes of memory a document. What is held out in one source and for training in another, white space
apart, is taken out of the training text when token files are made (`btx.data.prepare`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from btx.data import document_files
from btx.data.document_files import find_files
from btx.errors import DataError
from btx.process import note_progress
from btx.recipe.data import Data, Source

Split = Literal["train", "val"]
GENERATED_BYTES = 3_000_000
LONG_TEXT = 1 << 20
WHITE_SPACE = re.compile(r"\s")
HELD_OUT_NAMES = ("val", "test", "heldout")


def read_documents(source: Source, split: Split, *, domain: str, data: Data, rng_seed: int) -> Iterator[str]:
    """The documents of one side of `source`, a source of domain `domain`; arguments and errors: `split_documents`."""
    documents = split_documents(source, domain=domain, data=data, rng_seed=rng_seed)
    return (text for side, text in documents if side == split)


def split_documents(
    source: Source, *, domain: str, data: Data, rng_seed: int, skipped: Counter[str] | None = None
) -> Iterator[tuple[Split, str]]:
    """Both sides of `source` in one pass, each document with its side.

    Args:
        source: anything but a `domain:` source, which has no documents of its own (see `btx.recipe.mixtures.resolve`).
        domain: the domain `source` belongs to, a key of `data.domains`.
        data: gives the root of relative paths, the held-out share and the domain's held-out files.
        rng_seed: what generators depend on.
        skipped: counts what is left out: documents that are `empty`, and `duplicates` of one before or held out.

    Raises:
        DataError: anything missing, empty or broken; names the domain, the file and the line or row.
        UserError: the format needs a package that is not installed.
    """
    if source.domain is not None:
        raise ValueError(f"a source that takes from domain {source.domain!r} has no documents of its own")
    skipped = Counter[str]() if skipped is None else skipped
    with naming(domain):
        held_out, train = _sides(source, domain, data, rng_seed)
        if held_out is None:
            yield from _divide_by_hash(_up_to(_distinct(train, set(), skipped), source.max_bytes), data.held_out)
        else:
            val_bytes, train_bytes = _budgets(source.max_bytes, data.held_out)
            if not owns_held_out(source, domain, data):
                val_bytes = 0
            yield from _given_sides(held_out, train, val_bytes, train_bytes, skipped)


@contextmanager
def naming(domain: str) -> Iterator[None]:
    """Say of which domain the data are that the block finds missing or broken."""
    try:
        yield
    except DataError as error:
        raise DataError(f"domain {domain!r}: {error}") from error.__cause__


def source_files(source: Source, domain: str, data: Data) -> tuple[list[Path], list[Path]]:
    """The local files that a source's training documents and its held-out documents are read from, in order; empty
    where they come from elsewhere, and held-out files also where documents are divided by hash.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    named = data.domains[domain].held_out
    held_out = [] if named is None else find_files(named, data.root)
    if source.hub is not None and (folder := document_files.located(source.hub, data.root)).is_dir():
        return document_files.all_files(folder), held_out
    if source.path is None:
        return [], held_out
    files = find_files(source.path, data.root)
    among = held_out_among(files, document_files.fixed_part(source.path, data.root))
    return [file for file in files if file not in among], held_out or among


def _sides(source: Source, domain: str, data: Data, rng_seed: int) -> tuple[Iterable[str] | None, Iterable[str]]:
    """Held-out documents (None: not divided yet) and the others, neither limited nor freed of duplicates."""
    files, held_out_files = source_files(source, domain, data)
    held_out = document_files.read(held_out_files, source) if held_out_files else None
    if source.generate is not None:
        val, train = _generated(source, "val", data, rng_seed), _generated(source, "train", data, rng_seed)
        return val if held_out is None else held_out, train
    if source.hub is not None:
        return held_out, document_files.read_hub(source, data.root)
    return held_out, document_files.read(files, source)


def held_out_texts(source: Source, *, domain: str, data: Data, rng_seed: int) -> Iterator[str]:
    """The held-out documents of `source`; what is for training is read only if it has to be divided first.

    Args and Raises: as `split_documents`.
    """
    if not owns_held_out(source, domain, data):
        return
    with naming(domain):
        held_out, _ = _sides(source, domain, data, rng_seed)
        if held_out is not None:
            val_bytes, _ = _budgets(source.max_bytes, data.held_out)
            yield from _up_to(_distinct(held_out, set(), Counter()), val_bytes)
            return
    yield from read_documents(source, "val", domain=domain, data=data, rng_seed=rng_seed)


def held_out_among(files: list[Path], folder: Path) -> list[Path]:
    """The files that their name, or a folder of theirs below `folder`, calls held-out, if others are called train."""

    def called(file: Path, names: tuple[str, ...]) -> bool:
        return any(part.lower().startswith(names) for part in file.relative_to(folder).parts)

    if not any(called(file, ("train",)) for file in files):
        return []
    return [file for file in files if called(file, HELD_OUT_NAMES) and not called(file, ("train",))]


def _generated(source: Source, split: Split, data: Data, rng_seed: int) -> Iterator[str]:
    from btx.data.domains import documents

    assert source.generate is not None
    made = documents(source.generate, split, rng_seed, source.max_bytes or GENERATED_BYTES, data.held_out)
    return (document.text for document in made)


def owns_held_out(source: Source, domain: str, data: Data) -> bool:
    """False for the sources whose domain's held-out documents are counted with another source."""
    section = data.domains[domain]
    return section.held_out is None or source == next(
        item for item in section.sources if item.domain is None and item.weight
    )


def _budgets(max_bytes: int | None, held_out: float) -> tuple[int | None, int | None]:
    """Bytes of the held-out documents and of the others."""
    if max_bytes is None:
        return None, None
    val_bytes = max(1, round(max_bytes * held_out))
    return val_bytes, max_bytes - val_bytes


def _given_sides(
    held_out: Iterable[str], train: Iterable[str], val_bytes: int | None, train_bytes: int | None, skipped: Counter[str]
) -> Iterator[tuple[Split, str]]:
    """Held-out documents first; a train document that is among all of them, within the limit or not, is dropped."""
    seen: set[bytes] = set()
    distinct = _distinct(held_out, seen, skipped)
    yield from (("val", text) for text in _up_to(distinct, val_bytes))
    for _ in distinct:
        pass
    yield from (("train", text) for text in _up_to(_distinct(train, seen, skipped), train_bytes))


def _divide_by_hash(texts: Iterable[str], held_out: float) -> Iterator[tuple[Split, str]]:
    threshold = round(held_out * 2**64)
    for text in texts:
        yield "val" if int.from_bytes(_digest(text), "big") < threshold else "train", text


def _distinct(texts: Iterable[str], seen: set[bytes], skipped: Counter[str]) -> Iterator[str]:
    """The documents that are not white space only and whose digest is not in `seen`, which it joins; the others are
    counted in `skipped`.

    Two different texts have the same 64 bit digest with a probability of 3e-4 in a hundred million documents.
    """
    for text in texts:
        note_progress()
        if not text or text.isspace():
            skipped["empty"] += 1
        elif (digest := _digest(text)) in seen:
            skipped["duplicates"] += 1
        else:
            seen.add(digest)
            yield text


def digest_of(text: str) -> int:
    """64 bits of what a document says, white space apart: texts that differ in white space alone have the same."""
    if len(text) <= LONG_TEXT:
        return int.from_bytes(_digest(" ".join(text.split())), "little")
    hashed, between, start = blake2b(digest_size=8), "", 0
    while start < len(text):  # in parts that end before white space: a list of all words takes ten times the text
        end = space.start() if (space := WHITE_SPACE.search(text, start + LONG_TEXT)) else len(text)
        if words := text[start:end].split():
            hashed.update((between + " ".join(words)).encode())
            between = " "
        start = end
    return int.from_bytes(hashed.digest(), "little")


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


def _up_to(texts: Iterator[str], max_bytes: int | None) -> Iterator[str]:
    """The documents up to the one that reaches `max_bytes`; None is all."""
    used = 0
    while max_bytes is None or used < max_bytes:
        text = next(texts, None)
        if text is None:
            return
        yield text
        used += len(text.encode())
