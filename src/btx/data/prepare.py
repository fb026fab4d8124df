"""Prepare: the domains' documents → token files `<domain>/<number of the source>/{train,val}` in the data folder.

A source whose token files are there and were made from the same files, by the same tokenizer, is not read again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx.baselines.kinds import BASELINES
from btx.baselines.matching import matched_phases
from btx.data.document_files import find_files
from btx.data.mixture import domain_mixture, finetune_mixture, resolve, seed_mixture
from btx.data.sources import owns_held_out, read_documents, split_documents
from btx.data.token_files import DocumentEncoder, TokenFile, token_file_writer
from btx.errors import DataError
from btx.model_files.folders import atomic_folder
from btx.model_files.seed_config import seed_config
from btx.recipe.data import Source
from btx.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from btx.running.graph import Stage
    from btx.running.rundir import RunFolder

Log = Callable[[str], None]

MOST_EPOCHS = 50
LEAST_HELD_OUT_TOKENS = 100


def prepare_run(run: RunFolder, stage: Stage, log: Log) -> dict[str, dict[str, int]]:
    """The run's tokenizer and token files, checked against the budget of every stage; returns `prepare`'s summary.

    The tokenizer is the seed model's. For a seed model from scratch it is trained and written to `tokenizer/`.
    """
    from btx.data.tokenizer import save_tokenizer
    from btx.model_files.models import load_tokenizer

    folder, recipe = run.begin(stage), run.recipe
    if "tokenizer" in recipe.data.domains:
        raise DataError(
            "a domain cannot be called 'tokenizer': the tokenizer lies beside the domains' folders; rename it"
        )
    seed_model = recipe.seed_model
    if seed_model.path is not None:
        tokenizer = load_tokenizer(seed_model.path, revision=seed_model.revision)
    else:
        if not (folder / "tokenizer").is_dir():
            log(f"tokenizer: training {seed_model.tokenizer.vocab_size:,} entries")
            with atomic_folder(folder / "tokenizer") as target:
                save_tokenizer(new_tokenizer(recipe), target)
        tokenizer = load_tokenizer(folder / "tokenizer")
    summary = prepare(recipe, tokenizer, folder, log=log)
    check_budgets(recipe, folder)
    return summary


def new_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of a seed model from scratch, trained on the text that the model will be trained on."""
    from btx.data.tokenizer import as_loaded_beside, train_tokenizer

    assert recipe.seed_model.config is not None
    tokenizer = train_tokenizer(training_texts(recipe), recipe.seed_model.tokenizer.vocab_size)
    return as_loaded_beside(tokenizer, recipe.seed_model.config["model_type"])


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


def check_budgets(recipe: Recipe, folder: Path) -> None:
    """Check every domain's held-out text, and every stage's training tokens, against the token files in `folder`.

    Raises:
        DataError: a domain or source has too few tokens.
    """
    for domain in recipe.data.domains:
        check_held_out(recipe, folder, domain)
    if recipe.seed_model.train is not None:
        check_budget(recipe, folder, seed_mixture(recipe), recipe.seed_model.train.tokens, "seed_model.train.tokens")
    for domain in recipe.train.domains:
        tokens = recipe.branch_training(domain).tokens
        check_budget(recipe, folder, domain_mixture(recipe, domain), tokens, "train.tokens")
    check_budget(recipe, folder, finetune_mixture(recipe), recipe.finetune.tokens, "finetune.tokens")
    trained = [name for name in recipe.baselines if BASELINES[name].trains]
    dense = seed_config(recipe) if trained else {}
    for name in trained:
        for phase in matched_phases(recipe, name, dense):
            for weights in phase.mixtures:
                tokens = phase.settings.tokens // len(phase.mixtures)
                check_budget(recipe, folder, weights, tokens, f"baseline {name}")


def check_held_out(recipe: Recipe, folder: Path, domain: str) -> None:
    """Refuse a domain whose held-out documents are too few to measure anything.

    Raises:
        DataError: it has no held-out document, or fewer than 100 held-out tokens.
    """
    files = [TokenFile.open(folder / path / "val") for _, path, _ in resolve(recipe, {domain: 1.0})]
    documents, tokens = sum(file.documents for file in files), sum(len(file) for file in files)
    if not documents or tokens < LEAST_HELD_OUT_TOKENS:
        raise DataError(
            f"domain {domain!r}: {documents} held-out documents with {tokens} tokens; needed: at least 1 with "
            f"{LEAST_HELD_OUT_TOKENS}. Give the domain `held_out` files, more text, or a larger data.held_out "
            f"(now {recipe.data.held_out:g})"
        )


def check_budget(recipe: Recipe, folder: Path, weights: Mapping[str, float], tokens: int, where: str) -> None:
    """Refuse a mixture in which a source would be repeated too often, or is shorter than one training sequence.

    Args:
        weights: domain → sampling weight.
        tokens: training tokens of the stage.
        where: key of the recipe that says how many, for the message.

    Raises:
        DataError: names the source, the tokens it has and the tokens it needs.
    """
    for name, path, weight in resolve(recipe, weights):
        have, need = len(TokenFile.open(folder / path / "train")), round(tokens * weight)
        domain, number = name.split("/")
        source = f"domain {domain!r}, source {number}: {have:,} training tokens"
        if have < recipe.data.sequence_length + 1:
            raise DataError(f"{source}, fewer than one training sequence (data.sequence_length + 1 = "
                            f"{recipe.data.sequence_length + 1:,}); add text or shorten the sequences")  # fmt: skip
        if need > MOST_EPOCHS * have:
            raise DataError(
                f"{source}, but {where} = {tokens:,} takes {need:,} tokens from it: {need / have:.0f} epochs, at most "
                f"{MOST_EPOCHS} are allowed. Add text or raise max_bytes, to at least {-(-need // MOST_EPOCHS):,} "
                f"tokens, or lower {where} or the source's weight"
            )


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
