"""Prepare: a domain's documents → token files `<number of the source>/{train,val}` in the domain's folder.

A source whose token files are there and were made from the same text by the same tokenizer is not read again. What any
domain holds out is in no domain's training text: such documents are taken out, white space apart, and counted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btx.data.document_files import files_not_read
from btx.data.identity import domain_identity, own_sources
from btx.data.sources import digest_of, held_out_texts, read_documents, split_documents
from btx.data.token_files import INDEX, DocumentEncoder, TokenFile, take_out, token_file_writer
from btx.data.tokenizer import TokenizerFile
from btx.errors import DataError, first_few
from btx.process import Log
from btx.recipe.mixtures import resolve, seed_mixture
from btx.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Elsewhere:
    """What a domain's text is kept apart from."""

    held_out: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Other domain → digests (documents,) of what it holds out: taken out of this one's training text."""
    trained_on: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Other domain → digests of its training text, where that was finished before this domain was known: taken out of
    what this one holds out, because it cannot be taken out of models that have read it."""


def training_texts(recipe: Recipe) -> Iterator[str]:
    """Train documents for the tokenizer, up to `train_bytes`, in the seed model's mixture (by bytes).

    A source that ends early leaves its share to the others.
    """
    components = resolve(recipe, seed_mixture(recipe))
    weights = {name: weight for name, _, weight in components}
    documents = {name: _train_documents(recipe, name) for name in weights}
    used = dict.fromkeys(weights, 0)
    while documents and sum(used.values()) < recipe.seed_model.tokenizer.train_bytes:
        name = min(documents, key=lambda name: used[name] / weights[name])
        text = next(documents[name], None)
        if text is None:
            del documents[name]
            continue
        used[name] += len(text.encode())
        yield text


def prepare_domain(
    recipe: Recipe, domain: str, tokenizer: PreTrainedTokenizerBase | TokenizerFile, folder: Path, *,
    elsewhere: Elsewhere = Elsewhere(), log: Log,
) -> dict[str, Any]:  # fmt: skip
    """Write the token files of a domain's own sources.

    Args:
        tokenizer: a fast tokenizer, with an eos or bos token to separate documents.
        folder: the domain's folder, which is written.
        elsewhere: what other domains hold out and have been trained on.
        log: takes a line of text for each source.

    Returns:
        train_tokens, val_tokens, documents, bytes (both sides together), each summed over the domain's own sources;
        `skipped`: {component: {"empty" or "duplicates": documents}}; `not_read`: {component: names of files in its
        folder that are in no format that is read, or about the others}; `taken_out`: {"training": {component: {domain
        that holds it out: documents}}, "held_out": {component: {domain that was trained on it: documents}}}.

    Raises:
        DataError: data that are missing, empty or broken.
    """
    encoder = DocumentEncoder(tokenizer)
    numbered, identity = own_sources(recipe.data, domain), domain_identity(recipe.data, domain, recipe.rng_seed)
    if recipe.data.domains[domain].held_out is not None and not numbered:
        raise DataError(f"domain {domain!r}: `held_out` needs a source of the domain's own beside it; "
                        f"documents taken from other domains are held out there")  # fmt: skip
    not_read = {f"{domain}/{number}": names for number, source in numbered
                if source.path and (names := [file.name for file in files_not_read(source.path, recipe.data.root)])
                }  # fmt: skip
    for component, names in not_read.items():
        log(f"{component}: files that are not read: {first_few(names, 10)}")
    for number, _ in numbered:
        _prepare_source(recipe, domain, number, identity[str(number)], encoder, folder, log)
    folders = [folder / str(number) for number, _ in numbered]
    _keep_apart(domain, folders, elsewhere, log)
    train, val = ([TokenFile.open(folder / split) for folder in folders] for split in ("train", "val"))

    def noted(files: list[TokenFile], key: str) -> dict[str, Any]:
        return {f"{domain}/{file.folder.parent.name}": file.index[key] for file in files if key in file.index}

    return {
        "train_tokens": sum(len(file) for file in train),
        "val_tokens": sum(len(file) for file in val),
        "documents": sum(file.documents for file in [*train, *val]),
        "bytes": sum(file.bytes for file in [*train, *val]),
        "skipped": noted(train, "skipped"),
        "not_read": not_read,
        "taken_out": {"training": noted(train, "taken_out"), "held_out": noted(val, "taken_out")},
    }


def held_out_digests(recipe: Recipe, domain: str) -> np.ndarray:
    """Digests (documents,) of what a domain's own sources hold out, from its documents."""
    texts = (text for _, source in own_sources(recipe.data, domain)
             for text in held_out_texts(source, domain=domain, data=recipe.data, rng_seed=recipe.rng_seed))  # fmt: skip
    return np.fromiter((digest_of(text) for text in texts), np.uint64)


def training_digests(recipe: Recipe, domain: str, held_out: Mapping[str, np.ndarray]) -> np.ndarray:
    """Digests (documents,) of a domain's training text, from its documents.

    Args:
        held_out: other domain → what it holds out and this one is kept apart from.
    """
    digests: dict[str, list[int]] = {"train": [], "val": []}
    for _, source in own_sources(recipe.data, domain):
        for side, text in split_documents(source, domain=domain, data=recipe.data, rng_seed=recipe.rng_seed):
            digests[side].append(digest_of(text))
    train, val = (np.array(digests[side], np.uint64) for side in ("train", "val"))
    return np.setdiff1d(train, np.concatenate([val, *held_out.values()]))


def digests_of_files(folder: Path, split: str) -> np.ndarray:
    """Digests (documents,) of one side of a domain that is prepared."""
    files = [TokenFile.open(path.parent).digests for path in sorted(folder.glob(f"*/{split}/{INDEX}"))]
    return np.concatenate([np.empty(0, np.uint64), *files])


def _keep_apart(domain: str, folders: list[Path], elsewhere: Elsewhere, log: Log) -> None:
    """Take out of both sides what must not be there; how many documents and because of which domain is told, and noted
    in the token files."""
    for folder in folders:
        for other, digests in elsewhere.trained_on.items():
            if count := take_out(folder / "val", digests, because=other):
                log(f"{domain}/{folder.name}: {count:,} held-out documents were taken out: this run's models have read "
                    f"them in {other}")  # fmt: skip
    digests_here = np.concatenate(
        [np.empty(0, np.uint64), *[TokenFile.open(folder / "val").digests for folder in folders]]
    )
    for folder in folders:
        for other, digests in ({domain: digests_here} | dict(elsewhere.held_out)).items():
            if count := take_out(folder / "train", digests, because=other):
                log(f"{domain}/{folder.name}: {count:,} training documents were taken out: {other} holds them out")


def _prepare_source(
    recipe: Recipe, domain: str, number: int, description: dict[str, Any], encoder: DocumentEncoder, out: Path, log: Log
) -> None:
    folder, source = out / str(number), recipe.data.domains[domain].sources[number]
    if all(_is_made_from(folder / split, description, encoder.sha256) for split in ("train", "val")):
        log(f"{domain}/{number}: unchanged")
        return
    started, skipped = time.perf_counter(), Counter[str]()
    facts: dict[str, Any] = {"rng_seed": recipe.rng_seed, "source": description}
    with (
        token_file_writer(folder / "train", encoder, skipped=skipped, **facts) as train,
        token_file_writer(folder / "val", encoder, **facts) as val,
    ):
        for split, text in split_documents(
            source, domain=domain, data=recipe.data, rng_seed=recipe.rng_seed, skipped=skipped
        ):
            (train if split == "train" else val).add(text)
    made, held_out = TokenFile.open(folder / "train"), TokenFile.open(folder / "val")
    log(f"{domain}/{number}: {made.documents + held_out.documents:,} documents, {len(made):,} training tokens, "
        f"{len(held_out):,} held-out tokens, {time.perf_counter() - started:.1f} s")  # fmt: skip
    if skipped:
        log(f"{domain}/{number}: left out: {', '.join(f'{count:,} {why}' for why, count in sorted(skipped.items()))}")


def _is_made_from(folder: Path, description: dict[str, Any], tokenizer: str) -> bool:
    """Whether a complete token file with this description is there."""
    try:
        index = TokenFile.open(folder).index
    except DataError:
        return False
    return index["source"] == description and index["tokenizer_sha256"] == tokenizer


def _train_documents(recipe: Recipe, component: str) -> Iterator[str]:
    domain, number = component.split("/")
    source = recipe.data.domains[domain].sources[int(number)]
    return read_documents(source, "train", domain=domain, data=recipe.data, rng_seed=recipe.rng_seed)
