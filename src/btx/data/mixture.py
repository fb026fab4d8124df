"""Token files → training batches: a weighted mixture whose whole state is one integer, the sample number.

Sample g of a job is computed from g alone, so resuming, the number of ranks and the micro-batch size change nothing:

1. Quotas. Samples come in blocks of `quota_block`. After k blocks component c has had its weight's share of all samples
   (largest remainders), so it is off by less than one sample for ever. Within a block each component's samples are
   spread evenly, one at a random place in each of equal stretches.
2. Epochs. The n-th sample of a component with N training sequences is sequence `permutation(n mod N)`, with another
   permutation in each epoch n // N: each sequence once before any comes again. The permutation is a Feistel network,
   computed place by place, never stored.

A training sequence is S + 1 consecutive tokens of a token file, the last being only a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import ceil, isqrt
from typing import Self

import numpy as np

from btx.data.token_files import TokenFile
from btx.errors import DataError
from btx.files import value_hash

NO_LABEL = -100
"""In the place of a label: nothing is learnt or scored here (PyTorch's and transformers' own mark)."""
QUOTA_BLOCK = 1000
SMALLEST_WEIGHT = 1e-6
ROUNDS = 6


@dataclass(frozen=True)
class Batch:
    """Training sequences as int64 arrays (B, S)."""

    input_ids: np.ndarray
    labels: np.ndarray
    """The next token; -100 where none is to be learnt (after a document's own eos)."""
    position_ids: np.ndarray
    """Tokens since the document's start, or since the sequence's: attention stops where they restart."""

    @property
    def scored(self) -> int:
        """Labels, over which the loss is a mean."""
        return int((self.labels != NO_LABEL).sum())

    def rows(self, which: slice) -> Self:
        """Some of the sequences."""
        return type(self)(*(getattr(self, field.name)[which] for field in fields(self)))


class Mixture:
    """Weighted mixture of token files, indexed by the number of the sample in the whole job.

    Args:
        components: (name, token file, weight); weights are normalised, components of weight 0 left out.
        sequence_length: S, tokens a training sequence.
        rng_seed: decides the order, together with everything else in the fingerprint: another mixture of the same
            files has another order.

    Raises:
        DataError: a component has too few tokens for one sequence, or no weight is positive.
    """

    def __init__(self, components: Sequence[tuple[str, TokenFile, float]], sequence_length: int, rng_seed: int) -> None:
        used = [component for component in components if component[2] > 0]
        if not used:
            raise DataError("a mixture needs a component with a weight above 0")
        self.names = [name for name, _, _ in used]
        self.files = [file for _, file, _ in used]
        total = sum(weight for _, _, weight in used)
        self.weights = np.array([weight / total for _, _, weight in used])
        self.sequence_length = sequence_length
        self.rng_seed = rng_seed
        self.sequences = np.array([max(len(file) - 1, 0) // sequence_length for file in self.files])
        """Training sequences of each component."""
        self._refuse_impossible()
        self.quota_block = max(QUOTA_BLOCK, ceil(2 / self.weights.min()))
        self._key = np.array([int(self.fingerprint[:16], 16)], np.uint64)
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the samples: a job resumes only with the same fingerprint."""
        components = [
            (name, file.sha256, weight)
            for name, file, weight in zip(self.names, self.files, self.weights.tolist(), strict=True)
        ]
        return value_hash(
            {"components": components, "sequence_length": self.sequence_length, "rng_seed": self.rng_seed}
        )

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Component and sequence index of each sample: (N,) → (N,), (N,)."""
        if samples.size and samples.min() < 0:
            raise IndexError("sample numbers start at 0")
        components, ordinals = np.empty_like(samples), np.empty_like(samples)
        blocks, places = np.divmod(samples, self.quota_block)
        for block in np.unique(blocks):
            here = blocks == block
            block_components, block_ordinals = self._schedule(int(block))
            components[here], ordinals[here] = block_components[places[here]], block_ordinals[places[here]]
        sizes = self.sequences[components]
        epochs, places = np.divmod(ordinals, sizes)
        keys = mixed_bits(mixed_bits(self._key + _unsigned(components)) + _unsigned(epochs))
        return components, permuted(places, sizes, keys)

    def batch(self, start: int, count: int) -> Batch:
        """Samples start, ..., start + count - 1 as the rows of a batch."""
        S = self.sequence_length
        components, sequences = self.locate(np.arange(start, start + count))
        input_ids, labels, position_ids = (np.empty((count, S), np.int64) for _ in range(3))
        for component in np.unique(components):
            rows = components == component
            input_ids[rows], labels[rows], position_ids[rows] = _cut(self.files[component], sequences[rows] * S, S)
        return Batch(input_ids, labels, position_ids)

    def _schedule(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Component, and its samples before, for each place of a quota block: (quota_block,) twice."""
        if self._cached is None or self._cached[0] != block:
            before = apportion(self.weights, block * self.quota_block)
            counts = apportion(self.weights, (block + 1) * self.quota_block) - before
            components = np.repeat(np.arange(len(counts)), counts)
            nth = np.concatenate([np.arange(count) for count in counts])
            key = mixed_bits(~self._key + np.uint64(block))
            jitter = mixed_bits(key + _unsigned(np.arange(self.quota_block))) / 2.0**64
            order = np.argsort((nth + jitter) / counts[components], kind="stable")
            self._cached = (block, components[order], (before[components] + nth)[order])
        return self._cached[1], self._cached[2]

    def _refuse_impossible(self) -> None:
        for name, file, weight, sequences in zip(self.names, self.files, self.weights, self.sequences, strict=True):
            if not sequences:
                raise DataError(
                    f"{file.folder}: component {name!r} has {len(file)} tokens, fewer than one training sequence "
                    f"(data.sequence_length + 1 = {self.sequence_length + 1}); add text or shorten the sequences"
                )
            if weight < SMALLEST_WEIGHT:
                raise DataError(
                    f"component {name!r} has a share of {weight:.1e} of the mixture; "
                    f"allowed: 0 or at least {SMALLEST_WEIGHT:g}"
                )


class Interleaved:
    """Several mixtures read in turn: sample g is sample g // N of mixture g mod N.

    So a job of N times as many samples sees exactly what N jobs on one mixture each have seen, in their order: what a
    dense baseline trains on to match the branches' data.
    """

    def __init__(self, mixtures: Sequence[Mixture]) -> None:
        self.mixtures = list(mixtures)
        self.sequence_length = mixtures[0].sequence_length

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the samples."""
        return value_hash({"in turn": [mixture.fingerprint for mixture in self.mixtures]})

    def batch(self, start: int, count: int) -> Batch:
        """Samples start, ..., start + count - 1 as the rows of a batch."""
        number = len(self.mixtures)
        arrays = [np.empty((count, self.sequence_length), np.int64) for _ in range(3)]
        for which, mixture in enumerate(self.mixtures):
            first = (which - start) % number
            rows = range(first, count, number)
            if len(rows):
                part = mixture.batch((start + first) // number, len(rows))
                for array, values in zip(arrays, (part.input_ids, part.labels, part.position_ids), strict=True):
                    array[first::number] = values
        return Batch(*arrays)


def apportion(weights: np.ndarray, samples: int) -> np.ndarray:
    """Whole samples of each component, by largest remainders: sums to `samples`, each off by less than one.

    From one number of samples to one larger by 2 / min(weights) no component's count falls.
    """
    exact = weights * samples
    counts = np.floor(exact).astype(np.int64)
    missing = samples - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


def permuted(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Image of each place under the permutation of 0, ..., size - 1 that its key names: (N,) int64.

    A Feistel network over the grid of ceil(√size) rows that holds all places, applied again to what falls outside:
    https://en.wikipedia.org/wiki/Format-preserving_encryption (cycle walking).
    """
    rows = np.array([isqrt(size - 1) + 1 for size in sizes.tolist()], dtype=np.uint64)
    columns = (_unsigned(sizes) + rows - np.uint64(1)) // rows
    image = _unsigned(places)
    outside = np.arange(image.size)
    while outside.size:
        key, row_count, column_count = keys[outside], rows[outside], columns[outside]
        row, column = np.divmod(image[outside], column_count)
        for number in range(0, ROUNDS, 2):
            row = (row + mixed_bits(key + column * _ODD + np.uint64(number))) % row_count
            column = (column + mixed_bits(key + row * _ODD + np.uint64(number + 1))) % column_count
        image[outside] = row * column_count + column
        outside = outside[image[outside] >= _unsigned(sizes[outside])]
    return image.astype(np.int64)


def _cut(file: TokenFile, starts: np.ndarray, S: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Input ids, labels and position ids of the sequences that start at offsets `starts` (R,): each (R, S)."""
    offsets = starts[:, None] + np.arange(S)
    input_ids = file.tokens[offsets].astype(np.int64)
    labels = np.empty_like(input_ids)
    labels[:, :-1] = input_ids[:, 1:]
    labels[:, -1] = file.tokens[starts + S]
    first, last = np.searchsorted(file.document_starts, [starts, starts + S], side="right")
    rows = np.repeat(np.arange(len(starts)), last - first)
    inner = file.document_starts[_ranges(first, last)]  # documents that start inside a sequence, or right after it
    inner_places = inner - starts[rows]
    if file.trailing_eos:
        labels[rows, inner_places - 1] = NO_LABEL
    begins = np.zeros((len(starts), S + 1), np.int64)
    begins[rows, inner_places] = inner_places
    position_ids = np.arange(S) - np.maximum.accumulate(begins[:, :S], axis=1)
    return input_ids, labels, position_ids


def _ranges(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The integers from first[i] to last[i] - 1 for all i, one after the other."""
    lengths = last - first
    return np.arange(lengths.sum()) + np.repeat(first - (np.cumsum(lengths) - lengths), lengths)


_ODD = np.uint64(0x9E3779B97F4A7C15)


def mixed_bits(x: np.ndarray) -> np.ndarray:
    """Random numbers that depend on a number alone: uint64 from uint64, by the output function of splitmix64 (Steele,
    Lea, Flood 2014)."""
    x = x + _ODD
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _unsigned(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.uint64)
