"""Prepare: the domains' documents → token files `<domain>/<number of the source>/{train,val}` in the data folder.

A source whose token files are there and were made from the same files, by the same tokenizer, is not read again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx.data.document_files import find_files
from btx.data.sources import owns_held_out, read_documents, split_documents
from btx.data.token_files import DocumentEncoder, TokenFile, token_file_writer
from btx.errors import DataError
from btx.recipe.data import Source
from btx.recipe.mixtures import resolve, seed_mixture
from btx.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Log = Callable[[str], None]

MOST_EPOCHS = 50
LEAST_HELD_OUT_TOKENS = 100


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


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, out: Path, *, log: Log) -> dict[str, dict[str, int]]:
    """Write the token files of all domains' own sources to `out`.

    Args:
        tokenizer: a fast tokenizer, with an eos or bos token to separate documents.
        out: the data folder.
        log: takes a line of text for each source.

    Returns:
        domain → train_tokens, val_tokens, documents, bytes (both sides together), each summed over the domain's
        sources, those it takes from other domains included.

    Raises:
        DataError: data that are missing, empty or broken.
    """
    encoder = DocumentEncoder(tokenizer)
    for domain, section in recipe.data.domains.items():
        own = [(number, source) for number, source in enumerate(section.sources) if source.domain is None]
        if section.held_out is not None and not any(source.weight for _, source in own):
            raise DataError(f"domain {domain!r}: `held_out` needs a source of the domain's own beside it; "
                            f"documents taken from other domains are held out there")  # fmt: skip
        for number, source in own:
            if source.weight:
                _prepare_source(recipe, domain, number, encoder, out, log)
    return {domain: _summary(recipe, domain, out) for domain in recipe.data.domains}


def _prepare_source(recipe: Recipe, domain: str, number: int, encoder: DocumentEncoder, out: Path, log: Log) -> None:
    source = recipe.data.domains[domain].sources[number]
    folder = out / domain / str(number)
    description = _description(recipe, domain, source)
    if all(_is_made_from(folder / split, description, encoder.sha256) for split in ("train", "val")):
        log(f"{domain}/{number}: unchanged")
        return
    started = time.perf_counter()
    facts: dict[str, Any] = {"rng_seed": recipe.rng_seed, "source": description}
    with (
        token_file_writer(folder / "train", encoder, **facts) as train,
        token_file_writer(folder / "val", encoder, **facts) as val,
    ):
        for split, text in split_documents(source, domain=domain, data=recipe.data, rng_seed=recipe.rng_seed):
            (train if split == "train" else val).add(text)
    made, held_out = TokenFile.open(folder / "train"), TokenFile.open(folder / "val")
    log(f"{domain}/{number}: {made.documents + held_out.documents:,} documents, {len(made):,} training tokens, "
        f"{len(held_out):,} held-out tokens, {time.perf_counter() - started:.1f} s")  # fmt: skip


def _description(recipe: Recipe, domain: str, source: Source) -> dict[str, Any]:
    """Everything besides the tokenizer that decides the source's documents, as a JSON value."""
    try:
        return {
            **source.model_dump(mode="json", exclude={"weight"}, exclude_none=True),
            "held_out_share": recipe.data.held_out,
            "held_out": _file_marks(recipe.data.domains[domain].held_out, recipe.data.root),
            "owns_held_out": owns_held_out(source, domain, recipe.data),
            "files": _file_marks(source.path, recipe.data.root),
            "rng_seed": recipe.rng_seed if source.generate else None,
        }
    except DataError as error:
        raise DataError(f"domain {domain!r}: {error}") from error.__cause__


def _file_marks(path: str | None, root: str | None) -> list[list[str | int]]:
    """Name, size and modification time of each file, so that a changed file is noticed."""
    files = [] if path is None else find_files(path, root)
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


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


def _summary(recipe: Recipe, domain: str, out: Path) -> dict[str, int]:
    paths = [path for _, path, _ in resolve(recipe, {domain: 1.0})]
    train, val = ([TokenFile.open(out / path / split) for path in paths] for split in ("train", "val"))
    return {
        "train_tokens": sum(len(file) for file in train),
        "val_tokens": sum(len(file) for file in val),
        "documents": sum(file.documents for file in [*train, *val]),
        "bytes": sum(file.bytes for file in [*train, *val]),
    }
