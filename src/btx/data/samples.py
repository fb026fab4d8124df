"""What a training stage reads: samples by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from btx.data.mixture import Batch, Interleaved, Mixture
from btx.data.switching import Switching
from btx.data.token_files import TokenFile
from btx.recipe.mixtures import resolve
from btx.recipe.schema import Recipe


class Samples(Protocol):
    """What a training stage reads: samples by number, the same ones whenever and wherever they are asked for."""

    sequence_length: int

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the samples."""

    def batch(self, start: int, count: int) -> Batch:
        """Samples start, ..., start + count - 1 as the rows of a batch."""


def open_mixture(
    data: Path, recipe: Recipe, weights: Mapping[str, float], known_as: Mapping[str, str] | None = None
) -> Mixture:  # fmt: skip
    """Training samples of a mixture of domains.

    Args:
        data: the run's data folder.
        weights: domain → sampling weight.
        known_as: domain → the name it had when the run's models read it, which decides the order of the samples.

    Raises:
        DataError: token files are missing or broken.
    """
    components = [(name, TokenFile.open(data / path / "train"), weight)
                  for name, path, weight in resolve(recipe, weights, known_as=known_as)]  # fmt: skip
    return Mixture(components, recipe.data.sequence_length, recipe.rng_seed)


def open_mixtures(
    data: Path, recipe: Recipe, mixtures: Sequence[Mapping[str, float]], *, known_as: Mapping[str, str] | None = None,
    switching: float = 0.0,
) -> Samples:  # fmt: skip
    """Training samples of one mixture, or of several in turn; arguments as `open_mixture` and `in_turn` have them."""
    return in_turn([open_mixture(data, recipe, weights, known_as) for weights in mixtures], switching)


def in_turn(mixtures: Sequence[Mixture], switching: float) -> Samples:
    """Several mixtures in turn; or a single one, in which a share `switching` of the sequences switch domain."""
    if len(mixtures) > 1:
        return Interleaved(mixtures)
    return Switching(mixtures[0], switching) if switching else mixtures[0]


def unused_tokens(data: Path, recipe: Recipe, mixtures: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """Component → tokens at the end of its training text that fill no whole sequence, and so are in no sample."""
    length = recipe.data.sequence_length
    paths = dict.fromkeys(path for weights in mixtures for _, path, _ in resolve(recipe, weights))
    return {path: (len(TokenFile.open(data / path / "train")) - 1) % length for path in paths}
