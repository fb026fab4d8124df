"""The weighted mixture: exact shares, exact epochs, exact resuming; labels and positions; components of domains."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from btx.data.mixture import NO_LABEL, Mixture, apportion, permuted
from btx.data.token_files import TokenFile
from btx.errors import DataError
from btx.recipe.mixtures import domain_mixture, finetune_mixture, resolve, seed_mixture
from btx.recipe.schema import Recipe

SEPARATOR = 0
Weights = st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=6)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, documents: list[list[int]], *, trailing_eos: bool = False) -> TokenFile:
    """A token file with these documents, byte for byte as `btx.data.token_files` describes it."""
    folder.mkdir(parents=True)
    tokens = np.array([token for document in documents for token in document], "<u2")
    tokens.tofile(folder / "tokens.bin")
    np.save(folder / "documents.npy", np.cumsum([0, *map(len, documents)], dtype="<i8"))
    np.save(folder / "bytes.npy", np.array([len(document) for document in documents], "<i8"))
    index: dict[str, Any] = {
        "tokens": len(tokens), "bytes": len(tokens), "documents": len(documents), "dtype": "uint16",
        "trailing_eos": trailing_eos, "sha256": str(folder), "tokenizer_sha256": "t", "rng_seed": 0, "source": {},
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    return TokenFile.open(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[TokenFile]:
    """Six files of 5, 6, ..., 10 sequences of 4 tokens; token values are unique within a file."""
    root = tmp_path_factory.mktemp("files")
    return [write(root / str(n), [[SEPARATOR, *range(1, 4 * (5 + n) + 1)]]) for n in range(6)]


def mixture(files: list[TokenFile], weights: list[float], rng_seed: int = 0) -> Mixture:
    """A mixture of the first files, with sequences of 4 tokens."""
    return Mixture([(f"c{n}", files[n], weight) for n, weight in enumerate(weights)], 4, rng_seed)


@quick
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_is_a_bijection(size: int, key: int) -> None:
    image = permuted(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))
    assert sorted(image.tolist()) == list(range(size))


def test_permutations_of_different_keys_put_every_place_everywhere_equally_often() -> None:
    size, keys = 12, 6000
    images = permuted(
        np.tile(np.arange(size), keys), np.full(size * keys, size), np.repeat(np.arange(keys, dtype=np.uint64), size)
    ).reshape(keys, size)
    for place in range(size):
        counts = np.bincount(images[:, place], minlength=size)
        assert np.abs(counts - keys / size).max() < 6 * np.sqrt(keys / size)


@quick
@given(weights=Weights, blocks=st.integers(0, 10**6))
def test_shares_are_exact_to_one_sample_and_never_fall(weights: list[float], blocks: int) -> None:
    shares = np.array(weights) / sum(weights)
    block = max(1000, int(np.ceil(2 / shares.min())))
    before, after = apportion(shares, blocks * block), apportion(shares, (blocks + 1) * block)
    assert before.sum() == blocks * block
    assert np.abs(before - shares * blocks * block).max() < 1
    assert (after >= before).all()


@quick
@given(weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), rng_seed=st.integers(0, 2**32 - 1))
def test_after_every_block_each_component_has_had_its_share(
    files: list[TokenFile], weights: list[float], rng_seed: int
) -> None:
    mixed = mixture(files, weights, rng_seed)
    components, _ = mixed.locate(np.arange(3 * mixed.quota_block))
    for block in (1, 2, 3):
        samples = block * mixed.quota_block
        counts = np.bincount(components[:samples], minlength=len(weights))
        assert np.abs(counts - mixed.weights * samples).max() < 1


def test_a_rare_component_never_loses_a_sample_it_already_had(files: list[TokenFile]) -> None:
    """With blocks of 1000 samples, largest remainders would take one back from the third component."""
    mixed = mixture(files, [0.0216, 0.756, 0.0002, 0.2216, 0.0006])
    counts = [apportion(mixed.weights, block * 1000)[2] for block in (2, 3)]
    assert counts[0] > counts[1]
    components, _ = mixed.locate(np.arange(10 * mixed.quota_block))
    for block in range(1, 11):
        samples = block * mixed.quota_block
        assert np.abs(np.bincount(components[:samples], minlength=5) - mixed.weights * samples).max() < 1


def test_shares_are_close_within_a_block_too(files: list[TokenFile]) -> None:
    mixed = mixture(files, [0.5, 0.3, 0.2])
    components, _ = mixed.locate(np.arange(mixed.quota_block))
    for samples in range(1, mixed.quota_block):
        counts = np.bincount(components[:samples], minlength=3)
        assert np.abs(counts - mixed.weights * samples).max() < 4


@quick
@given(weights=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6), rng_seed=st.integers(0, 2**32 - 1))
def test_each_sequence_is_seen_once_before_any_comes_again(
    files: list[TokenFile], weights: list[float], rng_seed: int
) -> None:
    mixed = mixture(files, weights, rng_seed)
    components, sequences = mixed.locate(np.arange(500))
    for component, size in enumerate(mixed.sequences):
        seen = sequences[components == component]
        for start in range(0, len(seen) - size + 1, size):
            assert sorted(seen[start : start + size].tolist()) == list(range(size))


def test_each_epoch_has_its_own_order(files: list[TokenFile]) -> None:
    mixed = mixture(files[5:], [1.0])
    _, sequences = mixed.locate(np.arange(200))
    epochs = {tuple(epoch) for epoch in sequences.reshape(20, 10).tolist()}
    assert len(epochs) == 20


@quick
@given(start=st.integers(0, 10**12), length=st.integers(1, 40), rng_seed=st.integers(0, 2**32 - 1))
def test_starting_anywhere_gives_the_same_samples(
    files: list[TokenFile], start: int, length: int, rng_seed: int
) -> None:
    weights = [0.6, 0.3, 0.1]
    components, sequences = mixture(files, weights, rng_seed).locate(np.arange(start, start + length))
    for n in reversed(range(length)):
        alone = mixture(files, weights, rng_seed).locate(np.array([start + n]))
        assert alone == (components[n], sequences[n])


@quick
@given(cuts=st.lists(st.integers(1, 59), max_size=5, unique=True), start=st.integers(0, 5000))
def test_any_division_into_batches_gives_the_same_rows(files: list[TokenFile], cuts: list[int], start: int) -> None:
    mixed = mixture(files, [0.6, 0.3, 0.1])
    whole = mixed.batch(start, 60)
    edges = [0, *sorted(cuts), 60]
    parts = [mixed.batch(start + a, b - a) for a, b in pairwise(edges)]
    for name in ("input_ids", "labels", "position_ids"):
        np.testing.assert_array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts]))


def test_rng_seed_data_weights_and_length_change_the_fingerprint_and_the_order(files: list[TokenFile]) -> None:
    def order(mixed: Mixture) -> tuple[Any, ...]:
        return tuple(map(tuple, mixed.locate(np.arange(300))))

    first = mixture(files, [0.5, 0.5])
    again = mixture(files, [1.0, 1.0])
    assert (first.fingerprint, order(first)) == (again.fingerprint, order(again))
    others = [
        mixture(files, [0.5, 0.5], rng_seed=1),
        mixture(files[1:], [0.5, 0.5]),
        mixture(files, [0.5, 0.501]),
        Mixture([("c0", files[0], 0.5), ("c1", files[1], 0.5)], 3, 0),
        Mixture([("c0", files[0], 0.5), ("other", files[1], 0.5)], 4, 0),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert len({order(first), *map(order, others)}) == 6


def test_labels_are_the_next_tokens_and_every_token_is_in_one_sequence(files: list[TokenFile]) -> None:
    batch = mixture(files[2:], [1.0]).batch(0, 7)
    np.testing.assert_array_equal(batch.labels, batch.input_ids + 1)
    assert sorted(batch.input_ids.ravel().tolist()) == list(range(28))
    assert {array.dtype.name for array in (batch.input_ids, batch.labels, batch.position_ids)} == {"int64"}


def sequences_in_order(file: TokenFile, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All training sequences of a file, in the file's order."""
    mixed = Mixture([("c", file, 1.0)], length, 0)
    count = int(mixed.sequences[0])
    order = np.argsort(mixed.locate(np.arange(count))[1])
    batch = mixed.batch(0, count)
    return batch.input_ids[order], batch.labels[order], batch.position_ids[order]


def test_positions_restart_at_each_document_and_at_the_sequence(tmp_path: Path) -> None:
    file = write(tmp_path / "f", [[0, 1, 2, 3, 4, 5], [0, 1], [0, 1, 2], [0], [0, 1, 2, 3, 4]])
    input_ids, labels, positions = sequences_in_order(file, 4)
    assert input_ids.tolist() == [[0, 1, 2, 3], [4, 5, 0, 1], [0, 1, 2, 0], [0, 1, 2, 3]]
    assert labels.tolist() == [[1, 2, 3, 4], [5, 0, 1, 0], [1, 2, 0, 0], [1, 2, 3, 4]]
    assert positions.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 0], [0, 1, 2, 3]]


@quick
@given(lengths=st.lists(st.integers(1, 9), min_size=3, max_size=30), S=st.integers(1, 5), trailing_eos=st.booleans())
def test_positions_and_labels_are_those_of_a_plain_loop(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], S: int, trailing_eos: bool
) -> None:
    documents = [[0, *range(1, length + 1)] for length in lengths]
    file = write(tmp_path_factory.mktemp("loop") / "f", documents, trailing_eos=trailing_eos)
    tokens = [token for document in documents for token in document]
    ends = {int(start) - 1 for start in file.document_starts[1:]}
    input_ids, labels, positions = sequences_in_order(file, S)
    for row in range(len(input_ids)):
        position = -1
        for column in range(S):
            at = row * S + column
            position = 0 if tokens[at] == 0 else position + 1
            assert input_ids[row, column] == tokens[at]
            assert labels[row, column] == (NO_LABEL if trailing_eos and at in ends else tokens[at + 1])
            assert positions[row, column] == position


def test_components_without_weight_are_left_out(files: list[TokenFile]) -> None:
    assert mixture(files, [3.0, 0.0, 1.0]).names == ["c0", "c2"]


def test_impossible_mixtures_are_refused(files: list[TokenFile], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="weight above 0"):
        mixture(files, [0.0, 0.0])
    with pytest.raises(DataError, match=r"share of 1\.0e-08 of the mixture; allowed: 0 or at least 1e-06"):
        mixture(files, [1.0, 1e-8])
    short = write(tmp_path / "short", [[0, 1, 2, 3]])
    with pytest.raises(DataError, match=r"short: component 'law' has 4 tokens, fewer than one .* \+ 1 = 5\)"):
        Mixture([("law", short, 1.0)], 4, 0)
    with pytest.raises(IndexError):
        mixture(files, [1.0]).locate(np.array([-1]))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Three domains; the general one takes from math with half of its weight."""
    training = {"tokens": 1000}
    domains = {
        "math": {"sources": [{"path": "a", "weight": 3}, {"path": "b", "weight": 1}]},
        "code": "c",
        "general": [{"path": "d", "weight": 2}, {"domain": "math", "weight": 2}, {"path": "e", "weight": 0}],
    }
    return Recipe.model_validate(
        {"name": "x", "data": {"domains": domains}, "seed_model": {"path": "s"}, "finetune": training,
         "train": {**training, "domains": ["math", "code"], "replay": 0.2}}
    )  # fmt: skip


def test_a_source_that_takes_from_a_domain_becomes_that_domains_components(recipe: Recipe) -> None:
    assert resolve(recipe, {"general": 7.0}) == [
        ("general/0", "general/0", 0.5), ("math/0", "math/0", 0.375), ("math/1", "math/1", 0.125)
    ]  # fmt: skip


def test_a_component_reached_twice_has_the_sum_of_its_weights(recipe: Recipe) -> None:
    weights = {name: weight for name, _, weight in resolve(recipe, domain_mixture(recipe, "math"))}
    assert weights == pytest.approx({"math/0": 0.6 + 0.075, "math/1": 0.2 + 0.025, "general/0": 0.1})
    assert Counter(name for name, _, _ in resolve(recipe, {"math": 1.0, "general": 1.0})).most_common(1)[0][1] == 1


def test_each_stage_has_its_mixture(recipe: Recipe) -> None:
    assert seed_mixture(recipe) == {"general": 1.0}
    assert domain_mixture(recipe, "code") == {"code": 0.8, "general": 0.2}
    assert domain_mixture(recipe, "general") == {"general": 1.0}
    assert finetune_mixture(recipe) == {"math": 1.0, "code": 1.0, "general": 1.0}


def test_a_mixture_of_nothing_is_refused(recipe: Recipe) -> None:
    with pytest.raises(DataError, match="no weight above 0 in the mixture of math"):
        resolve(recipe, {"math": 0.0})
