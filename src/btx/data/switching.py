"""Training sequences that switch domain in the middle.

Packed sequences hold one domain each and attention stops at documents' borders, so a model never sees a text go over
from one domain to another, and its routers learn to stay with the expert they chose: measured, in docs/results.md.
"""

from __future__ import annotations

from copy import copy

import numpy as np

from btx.data.mixture import NO_LABEL, Batch, Mixture, mixed_bits
from btx.files import value_hash

OTHERS = 1 << 40
"""Sample numbers from here on give the second halves: no job gets that far."""


class Switching:
    """A mixture in which a `share` of the sequences go on, from their middle, with the second half of another one.

    The other sequence is drawn from the same mixture, so a domain's share of the tokens stays what it was. Attention
    goes on across the switch; the first token after it is nobody's label, as nothing announces it. Which sequences
    switch depends on the sample's number alone.
    """

    def __init__(self, mixture: Mixture, share: float) -> None:
        self.mixture = mixture
        self.others = copy(mixture)  # with a place of its own in the schedule, which each keeps a block of
        self.share = share
        self.sequence_length = mixture.sequence_length
        self._key = np.uint64(int(mixture.fingerprint[16:32], 16))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the samples."""
        return value_hash({"switches": self.share, "of": self.mixture.fingerprint})

    def switches(self, samples: np.ndarray) -> np.ndarray:
        """Which of these samples switch, True or False each."""
        return mixed_bits(samples.astype(np.uint64) ^ self._key) < np.float64(self.share) * 2.0**64

    def batch(self, start: int, count: int) -> Batch:
        """Samples start, ..., start + count - 1 as the rows of a batch."""
        batch = self.mixture.batch(start, count)
        rows = np.flatnonzero(self.switches(np.arange(start, start + count)))
        if len(rows):
            other = self.others.batch(OTHERS + start, count)
            _join(batch, other, rows, max(1, self.sequence_length // 2))
        return batch


def _join(batch: Batch, other: Batch, rows: np.ndarray, middle: int) -> None:
    """From column `middle` on, put the rows of `other` into those of `batch`, as the same document's next tokens."""
    for name in ("input_ids", "labels", "position_ids"):
        getattr(batch, name)[rows, middle:] = getattr(other, name)[rows, middle:]
    batch.labels[rows, middle - 1] = NO_LABEL
    # Up to the first document that starts after the middle, positions go on from those before it.
    columns = np.arange(middle, batch.position_ids.shape[1])
    starts = (batch.position_ids[rows, middle:] == 0) & (columns > middle)
    goes_on = np.cumsum(starts, axis=1) == 0
    continued = batch.position_ids[rows, middle - 1, None] + 1 + columns - middle
    batch.position_ids[rows, middle:] = np.where(goes_on, continued, batch.position_ids[rows, middle:])
