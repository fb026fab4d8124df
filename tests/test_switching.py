"""Training sequences that switch domain in the middle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from btx.data.mixture import NO_LABEL, Mixture
from btx.data.switching import OTHERS, Switching
from tests.test_mixture import write

S = 8


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Two domains of documents of 3 to 14 tokens; a document's first token is 0, the others tell the domain."""
    root = tmp_path_factory.mktemp("domains")
    files = [
        write(root / name, [[0, *range(first, first + 2 + n % 12)] for n in range(60)])
        for name, first in (("a", 100), ("b", 200))
    ]
    return Mixture([("a", files[0], 0.5), ("b", files[1], 0.5)], S, 0)


def test_a_share_of_the_sequences_goes_on_with_the_second_half_of_another(mixture: Mixture) -> None:
    switching, count, middle = Switching(mixture, 0.3), 400, S // 2
    plain, other, batch = mixture.batch(7, count), mixture.batch(OTHERS + 7, count), switching.batch(7, count)
    switched = switching.switches(np.arange(7, 7 + count))
    assert 0.2 < switched.mean() < 0.4
    for name in ("input_ids", "labels", "position_ids"):
        assert np.array_equal(getattr(batch, name)[~switched], getattr(plain, name)[~switched])
    assert np.array_equal(batch.input_ids[switched, :middle], plain.input_ids[switched, :middle])
    assert np.array_equal(batch.input_ids[switched, middle:], other.input_ids[switched, middle:])
    assert np.array_equal(batch.labels[switched, middle:], other.labels[switched, middle:])
    assert (batch.labels[switched, middle - 1] == NO_LABEL).all()
    for row in np.flatnonzero(switched):
        position = int(batch.position_ids[row, middle - 1])
        for column in range(middle, S):  # restarts at documents' starts, but not at the switch itself
            restarts = column > middle and batch.input_ids[row, column] == 0
            position = 0 if restarts else position + 1
            assert batch.position_ids[row, column] == position
    domains = {(a >= 200, b >= 200) for a, b in batch.input_ids[switched][:, [middle - 1, middle]] if a and b}
    assert len(domains) == 4  # every pair of domains


def test_samples_depend_on_their_number_alone(mixture: Mixture) -> None:
    switching = Switching(mixture, 0.5)
    whole = switching.batch(0, 30)
    for start, count in ((0, 1), (3, 5), (29, 1)):
        part = switching.batch(start, count)
        for name in ("input_ids", "labels", "position_ids"):
            assert np.array_equal(getattr(part, name), getattr(whole, name)[start : start + count])
    assert len({mixture.fingerprint, switching.fingerprint, Switching(mixture, 0.4).fingerprint}) == 3
    none, all_of_them = Switching(mixture, 0.0), Switching(mixture, 1.0)
    assert np.array_equal(none.batch(0, 30).input_ids, mixture.batch(0, 30).input_ids)
    assert (all_of_them.batch(0, 30).labels[:, S // 2 - 1] == NO_LABEL).all()


def test_sequences_of_one_token_have_nothing_to_switch(tmp_path: Path) -> None:
    mixture = Mixture([("a", write(tmp_path / "a", [[0, 1, 2], [0, 5]]), 1.0)], 1, 0)
    assert Switching(mixture, 1.0).batch(0, 3).input_ids.tolist() == mixture.batch(0, 3).input_ids.tolist()
