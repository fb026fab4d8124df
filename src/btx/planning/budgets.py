"""Whether prepared data are enough: held-out text to measure on, and training text for the tokens of every stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from btx.choices.baselines import BASELINES
from btx.data.token_files import TokenFile
from btx.errors import DataError
from btx.recipe.mixtures import domain_mixture, domains_in, finetune_mixture, resolve, seed_mixture
from btx.recipe.schema import Recipe

MOST_EPOCHS = 50
LEAST_HELD_OUT_TOKENS = 100


def check_budgets(recipe: Recipe, folders: Mapping[str, Path], *, baselines: bool = True) -> None:
    """Check the token files of some domains: enough held-out text, and enough training text for every stage.

    Args:
        folders: domain → its prepared folder, of those that are looked at; one that takes text from others together
            with these.
        baselines: look at what trained baselines need too, for which models' sizes are counted (with torch).

    Raises:
        DataError: a domain or source has too few tokens.
    """
    for domain in folders:
        if set(domains_in(recipe, {domain: 1.0})) <= folders.keys():
            check_held_out(recipe, folders, domain)
    uses = reading(recipe)
    trained = [name for name in recipe.baselines if BASELINES[name].trains and baselines]
    if trained:
        from btx.baselines.matching import matched_phases
        from btx.models.seed_config import seed_config

        dense = seed_config(recipe)
    for name in trained:
        for phase in matched_phases(recipe, name, dense):
            tokens = phase.settings.tokens // len(phase.mixtures)
            uses += [(weights, tokens, f"baseline {name}") for weights in phase.mixtures]
    for weights, tokens, where in uses:
        check_budget(recipe, folders, weights, tokens, where)


def reading(recipe: Recipe) -> list[tuple[dict[str, float], int, str]]:
    """(domain → sampling weight, training tokens, key of the recipe that says how many) of every training that is no
    baseline's."""
    seed = recipe.seed_model.train
    of_seed = [] if seed is None else [(seed_mixture(recipe), seed.tokens, "seed_model.train.tokens")]
    branches = [(domain_mixture(recipe, domain), recipe.branch_training(domain).tokens, "train.tokens")
                for domain in recipe.train.domains]  # fmt: skip
    return [*of_seed, *branches, (finetune_mixture(recipe), recipe.finetune.tokens, "finetune.tokens")]


def check_held_out(recipe: Recipe, folders: Mapping[str, Path], domain: str) -> None:
    """Refuse a domain whose held-out documents are too few to measure anything.

    Raises:
        DataError: it has no held-out document, or fewer than 100 held-out tokens.
    """
    components = [name.split("/") for name, _, _ in resolve(recipe, {domain: 1.0})]
    files = [TokenFile.open(folders[name] / number / "val") for name, number in components]
    documents, tokens = sum(file.documents for file in files), sum(len(file) for file in files)
    if not documents or tokens < LEAST_HELD_OUT_TOKENS:
        raise DataError(
            f"domain {domain!r}: {documents} held-out documents with {tokens} tokens; needed: at least 1 with "
            f"{LEAST_HELD_OUT_TOKENS}. Give the domain `held_out` files, more text, or a larger data.held_out "
            f"(now {recipe.data.held_out:g})"
        )


def check_budget(
    recipe: Recipe, folders: Mapping[str, Path], weights: Mapping[str, float], tokens: int, where: str
) -> None:
    """Refuse a mixture in which a source would be repeated too often, or is shorter than one training sequence.

    Args:
        folders: domain → its prepared folder; sources of other domains are not looked at.
        weights: domain → sampling weight.
        tokens: training tokens of the stage.
        where: key of the recipe that says how many, for the message.

    Raises:
        DataError: names the source, the tokens it has and the tokens it needs.
    """
    for name, _, weight in resolve(recipe, weights):
        domain, number = name.split("/")
        if domain not in folders:
            continue
        have, need = len(TokenFile.open(folders[domain] / number / "train")), round(tokens * weight)
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
