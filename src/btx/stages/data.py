"""Data: the domains' documents become token files, checked against the budget of every stage."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from btx.baselines.matching import matched_phases
from btx.choices.baselines import BASELINES
from btx.data.prepare import LEAST_HELD_OUT_TOKENS, MOST_EPOCHS, prepare, training_texts
from btx.data.token_files import TokenFile
from btx.errors import DataError
from btx.files import atomic_folder
from btx.models.seed_config import seed_config
from btx.process import Interrupts, Log
from btx.recipe.mixtures import domain_mixture, finetune_mixture, resolve, seed_mixture
from btx.recipe.schema import Recipe
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_run(run: RunFolder, stage: Stage, log: Log) -> dict[str, dict[str, int]]:
    """The run's tokenizer and token files, checked against the budget of every stage; returns `prepare`'s summary.

    The tokenizer is the seed model's. For a seed model from scratch it is trained and written to `tokenizer/`.
    """
    from btx.data.tokenizer import save_tokenizer
    from btx.models.loading import load_tokenizer

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


def prepare_data(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """The run's tokenizer and token files."""
    started = time.perf_counter()
    summary = prepare_run(run, stage, log)
    run.finish(stage, tokens=0, flops=0.0, wall_s=time.perf_counter() - started, domains=summary)
