"""Which domains a stage of a recipe trains on, and which sources those stand for. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping

from btx.errors import DataError
from btx.recipe.schema import Recipe


def resolve(
    recipe: Recipe, weights: Mapping[str, float], *, known_as: Mapping[str, str] | None = None
) -> list[tuple[str, str, float]]:
    """The components of a mixture of domains, with weights that sum to 1.

    A source of a domain is the component `<domain>/<number of the source>`; a source that takes from another domain
    stands for that domain's components. A component reached twice has the sum of both weights.

    Args:
        weights: domain → sampling weight.
        known_as: domain → the name that its components bear, for a domain that has been renamed.

    Returns:
        (component name, folder of its token files `train` and `val` relative to the data folder, weight); weights of 0
        are left out.

    Raises:
        DataError: no weight is positive.
    """
    weights_of: dict[tuple[str, int], float] = {}

    def add(domain: str, weight: float) -> None:
        sources = recipe.data.domains[domain].sources
        total = sum(source.weight for source in sources)
        for number, source in enumerate(sources):
            share = weight * source.weight / total if total else 0.0
            if source.domain is not None:
                add(source.domain, share)
            elif share > 0:
                weights_of[domain, number] = weights_of.get((domain, number), 0.0) + share

    for domain, weight in weights.items():
        add(domain, weight)
    total = sum(weights_of.values())
    if not total:
        raise DataError(f"no weight above 0 in the mixture of {', '.join(weights) or 'no domain'}")
    names = known_as or {}
    return [
        (f"{names.get(domain, domain)}/{number}", f"{domain}/{number}", weight / total)
        for (domain, number), weight in weights_of.items()
    ]


def domains_in(recipe: Recipe, weights: Mapping[str, float]) -> list[str]:
    """The domains whose own documents a mixture reads, each once; arguments and errors as for `resolve`."""
    return list(dict.fromkeys(name.split("/")[0] for name, _, _ in resolve(recipe, weights)))


def seed_mixture(recipe: Recipe) -> dict[str, float]:
    """Domain → sampling weight of a seed model from scratch: the recipe's, or the general domain alone."""
    train = recipe.seed_model.train
    return dict((train and train.mixture) or {recipe.data.general: 1.0})


def domain_mixture(recipe: Recipe, domain: str) -> dict[str, float]:
    """Domain → sampling weight of a branch: its domain, and a replay share of general text (paper, section 4.1)."""
    if domain == recipe.data.general:
        return {domain: 1.0}
    return {domain: 1.0 - recipe.train.replay, recipe.data.general: recipe.train.replay}


def finetune_mixture(recipe: Recipe) -> dict[str, float]:
    """Domain → sampling weight of finetuning: the recipe's, or every expert's domain and the general one equally."""
    return dict(recipe.finetune.mixture or dict.fromkeys([*recipe.train.domains, recipe.data.general], 1.0))
