"""Conversations → training sequences: whole conversations side by side in a row, attention kept within each.

A row of S places holds conversations as they fit, the longest first, each into the fullest row that has room (best fit
decreasing; the packing of Ding et al., arXiv 2404.10830). What is left is filled with the beginning of the row once
more, which is not learnt: so there is no padding, and what load is balanced over is text. Two answers of a pair are in
one row.

Sample g is row `permutation(g mod R)` of R rows, with another permutation in each epoch, as in `btx.data.mixture`.

Shape letters: B rows of a batch, S places of a row, N tokens of a conversation, A answers of a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from btx.data.chat_text import Encoded
from btx.data.mixture import NO_LABEL, Batch, mixed_bits, permuted
from btx.errors import DataError
from btx.files import value_hash

NO_ANSWER = -1


@dataclass(frozen=True)
class PairBatch(Batch):
    """Rows of pairs: the better answer of pair p of a row is its answer 2p, the worse one 2p + 1."""

    answers: np.ndarray
    """Number of the answer whose label a place has (B, S); -1: of none."""
    reference: np.ndarray
    """Log probability that the reference gives each answer (B, A), float32; 0 for those that a row has not."""

    @property
    def scored(self) -> int:
        """Pairs, over which the loss is a mean."""
        return int((self.answers.max(axis=1) + 1).sum()) // 2


@dataclass(frozen=True)
class Fitted:
    """Conversations, or pairs of answers, that fit into a row; and how many did not."""

    groups: list[tuple[Encoded, ...]]
    """One conversation each, or two answers."""
    cut: int
    left_out: int

    def told(self, what: str) -> str:
        """In words."""
        changed = [f"{self.cut:,} cut"] * bool(self.cut) + [f"{self.left_out:,} left out"] * bool(self.left_out)
        return f"{len(self.groups):,} {what}" + (f"; too long: {', '.join(changed)}" if changed else "")


def fitted(
    groups: Iterable[tuple[Encoded, ...]], sequence_length: int, too_long: str, *, where: str
) -> Fitted:  # fmt: skip
    """What fits into rows of `sequence_length` places.

    Args:
        groups: what has to be in one row.
        too_long: what becomes of what does not fit: leave_out, cut or refuse.
        where: section of the recipe, for messages.

    Raises:
        DataError: something does not fit and is to be refused, or nothing fits.
    """
    kept, cut, left_out = list[tuple[Encoded, ...]](), 0, 0
    for group in groups:
        places = sum(len(each.ids_N) - 1 for each in group)
        if places <= sequence_length:
            kept.append(group)
            continue
        if too_long == "refuse":
            raise DataError(
                f"{group[0].where}: {places:,} tokens do not fit into data.sequence_length, {sequence_length:,}, and "
                f"{where}.too_long is refuse; leave_out or cut goes on without, or without their ends"
            )
        shorter = tuple(_beginning(each, sequence_length // len(group)) for each in group) if too_long == "cut" else ()
        if shorter and all(each.is_answer_N[1:].any() for each in shorter) and _differ(shorter):
            kept.append(shorter)
            cut += 1
        else:
            left_out += 1
    if not kept:
        raise DataError(f"{where}.data: all {left_out:,} lines are longer than data.sequence_length, "
                        f"{sequence_length:,} tokens; make it larger, or the lines shorter")  # fmt: skip
    return Fitted(kept, cut, left_out)


def _beginning(each: Encoded, places: int) -> Encoded:
    return Encoded(each.where, each.ids_N[: places + 1], each.is_answer_N[: places + 1])


def _differ(answers: Sequence[Encoded]) -> bool:
    return len(answers) == 1 or not np.array_equal(answers[0].ids_N, answers[1].ids_N)


class PackedConversations:
    """Rows of conversations by number.

    Args:
        groups: what is in one row together: single conversations, or pairs of answers.
        sequence_length: S; everything fits.
        rng_seed: decides the order of the rows.
    """

    def __init__(self, groups: Sequence[tuple[Encoded, ...]], sequence_length: int, rng_seed: int) -> None:
        self.sequence_length, self.rng_seed = sequence_length, rng_seed
        self.groups = list(groups)
        lengths = [sum(len(each.ids_N) - 1 for each in group) for group in self.groups]
        self.rows = best_fit_decreasing(lengths, sequence_length)
        self.filled = sum(lengths) / (len(self.rows) * sequence_length)
        """Share of the places that hold conversations."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the samples."""
        texts = [[each.ids_N.tolist(), np.flatnonzero(each.is_answer_N).tolist()] for g in self.groups for each in g]
        return value_hash({"conversations": value_hash(texts), "in a row": len(self.groups[0]),
                           "sequence_length": self.sequence_length, "rng_seed": self.rng_seed})  # fmt: skip

    def batch(self, start: int, count: int) -> Batch:
        """Samples start, ..., start + count - 1 as the rows of a batch."""
        return self.of_rows(self.located(start, count))

    def located(self, start: int, count: int) -> list[int]:
        """Numbers of the rows that some samples are."""
        epochs, places = np.divmod(np.arange(start, start + count), len(self.rows))
        key = mixed_bits(np.array([int(self.fingerprint[:16], 16)], np.uint64))
        keys = mixed_bits(key + epochs.astype(np.uint64))
        return permuted(places, np.full(count, len(self.rows)), keys).tolist()

    def of_rows(self, rows: Sequence[int]) -> Batch:
        """Rows by their own numbers."""
        arrays = [self._row(row) for row in rows]
        return Batch(*(np.stack([row[part] for row in arrays]) for part in range(3)))

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Input ids, labels, position ids and answers of a row: (S,) each."""
        conversations = [each for group in self.rows[number] for each in self.groups[group]]
        input_ids = np.concatenate([each.ids_N[:-1] for each in conversations])
        labels = np.concatenate([np.where(each.is_answer_N, each.ids_N, NO_LABEL)[1:] for each in conversations])
        positions = np.concatenate([np.arange(len(each.ids_N) - 1) for each in conversations])
        answers = np.concatenate([
            np.where(each.is_answer_N[1:], place, NO_ANSWER) for place, each in enumerate(conversations)
        ])  # fmt: skip
        S, used = self.sequence_length, len(input_ids)
        return (
            np.resize(input_ids, S), np.pad(labels, (0, S - used), constant_values=NO_LABEL),
            np.resize(positions, S), np.pad(answers, (0, S - used), constant_values=NO_ANSWER),
        )  # fmt: skip


class PackedPairs(PackedConversations):
    """Rows of pairs of answers by number.

    Args:
        reference: log probability of each answer of each row (R, A); None: not known yet, 0.
    """

    def __init__(
        self, groups: Sequence[tuple[Encoded, ...]], sequence_length: int, rng_seed: int,
        reference: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        super().__init__(groups, sequence_length, rng_seed)
        answers = 2 * max(map(len, self.rows))
        self.reference = np.zeros((len(self.rows), answers), np.float32) if reference is None else reference

    def of_rows(self, rows: Sequence[int]) -> PairBatch:
        """Rows by their own numbers."""
        arrays = [self._row(row) for row in rows]
        input_ids, labels, positions, answers = (np.stack([row[part] for row in arrays]) for part in range(4))
        return PairBatch(input_ids, labels, positions, answers, self.reference[list(rows)])


def best_fit_decreasing(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the things in each row, longest first, each in the fullest row with room for it."""
    rows, left = list[list[int]](), list[tuple[int, int]]()  # (room left, row), sorted
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = bisect.bisect_left(left, (lengths[number], -1))
        if place == len(left):
            rows.append([])
            space, row = room, len(rows) - 1
        else:
            space, row = left.pop(place)
        rows[row].append(number)
        bisect.insort(left, (space - lengths[number], row))
    return rows
