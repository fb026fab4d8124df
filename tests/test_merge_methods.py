"""Merge methods against slow references that were written apart from them: one number at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from btx.choices.merges import MERGE_METHODS, MergeSettings
from btx.errors import CheckpointError
from btx.mixing.merge_methods import bind
from btx.model_files.lazy_tensors import rounded

Models = tuple[Tensor, dict[str, Tensor]]


def models(count: int = 3, shape: tuple[int, ...] = (7, 11), dtype: torch.dtype = torch.float32) -> Models:
    """A seed tensor and members around it; the last one is the generalist, the seed itself."""
    generator = torch.Generator().manual_seed(1)
    seed = torch.randn(shape, generator=generator).to(dtype)
    members = {name: (seed + 0.3 * torch.randn(shape, generator=generator)).to(dtype) for name in "abcdef"[: count - 1]}
    return seed, members | {"generalist": seed}


def merge(method: MergeSettings, name: str, seed: Tensor, members: dict[str, Tensor]) -> Tensor:
    """The merged tensor in the models' type, as `btx mix` writes it."""
    function = bind(method, list(members)).function
    return rounded(function(list(members.values()), seed, name), seed.dtype)


def ties_reference(seed: list[float], tensors: list[list[float]], density: float, scale: float) -> list[float]:
    """Algorithm 1 of arXiv 2306.01708, entry by entry."""
    vectors = [[value - start for value, start in zip(tensor, seed, strict=True)] for tensor in tensors]
    for vector in vectors:
        keep = set(sorted(range(len(vector)), key=lambda p, v=vector: -abs(v[p]))[: int(density * len(vector))])
        vector[:] = [value if place in keep else 0.0 for place, value in enumerate(vector)]
    merged = []
    for start, values in zip(seed, zip(*vectors, strict=True), strict=True):
        positive, negative = [v for v in values if v > 0], [v for v in values if v < 0]
        winners = positive if sum(positive) > -sum(negative) else negative
        merged.append(start + scale * (sum(winners) / len(winners) if winners else 0.0))
    return merged


@pytest.mark.parametrize(("density", "scale"), [(0.2, 1.0), (0.5, 0.7), (1.0, 1.0)])
def test_ties_is_the_papers_algorithm(density: float, scale: float) -> None:
    seed, members = models(5)
    found = merge(MergeSettings("ties", density=density, scale=scale), "w", seed, members)
    lists = [member.double().flatten().tolist() for member in members.values()]
    expected = ties_reference(seed.double().flatten().tolist(), lists, density, scale)
    assert torch.allclose(found.flatten().double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_ties_leaves_the_generalist_no_say() -> None:
    seed, members = models(4)
    method = MergeSettings("ties", density=1.0)
    without = {name: tensor for name, tensor in members.items() if name != "generalist"}
    assert torch.equal(merge(method, "w", seed, members), merge(method, "w", seed, without))


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_keeps_to_the_great_circle(t: float) -> None:
    seed, members = models(2, shape=(40,))
    a, b = members["a"].double(), seed.double()
    found = merge(MergeSettings("slerp", t=t), "w", seed, members).double()
    # Reference: rotate a by t times the angle within the plane of a and b, lengths interpolated by the same formula.
    angle = math.atan2(float((b - a * (a @ b) / (a @ a)).norm() * a.norm()), float(a @ b))
    expected = a * math.sin((1 - t) * angle) / math.sin(angle) + b * math.sin(t * angle) / math.sin(angle)
    assert torch.allclose(found, expected, atol=1e-5)
    unit_a, unit_b = members["a"] / members["a"].norm(), seed / seed.norm()
    on_sphere = merge(MergeSettings("slerp", t=t), "w", unit_b, {"a": unit_a, "generalist": unit_b})
    assert float(on_sphere.norm()) == pytest.approx(1.0, abs=1e-6)
    assert math.acos(min(1.0, float(on_sphere @ unit_a))) == pytest.approx(t * angle, abs=2e-3)


@pytest.mark.parametrize("second", [torch.ones(5), 2 * torch.ones(5), -torch.ones(5), torch.zeros(5)])
def test_slerp_of_parallel_opposite_or_zero_tensors_is_the_straight_line(second: Tensor) -> None:
    found = merge(MergeSettings("slerp", t=0.25), "w", second, {"a": torch.ones(5), "generalist": second})
    assert torch.allclose(found, 0.75 * torch.ones(5) + 0.25 * second)


def test_dare_keeps_rescaled_entries_and_is_the_mean_in_expectation() -> None:
    seed, member = torch.zeros(40_000), torch.full((40_000,), 3.0)
    found = merge(MergeSettings("dare", density=0.25), "w", seed, {"a": member, "generalist": seed})
    kept = found != 0
    assert torch.equal(found[kept], torch.full_like(found[kept], 3.0 / 0.25 / 2))
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(found.mean()) == pytest.approx(1.5, abs=0.06)


def test_dare_with_density_1_is_the_mean() -> None:
    seed, members = models(4)
    found = merge(MergeSettings("dare", density=1.0), "w", seed, members)
    assert torch.allclose(found, merge(MergeSettings(), "w", seed, members), atol=1e-6)


def test_dare_drops_the_same_entries_for_the_same_seed_and_tensor_only() -> None:
    seed, members = models()
    torch.manual_seed(1)
    one = merge(MergeSettings("dare"), "w", seed, members)
    torch.manual_seed(2)
    assert torch.equal(one, merge(MergeSettings("dare"), "w", seed, members))
    assert not torch.equal(one, merge(MergeSettings("dare"), "another tensor", seed, members))
    assert not torch.equal(one, merge(MergeSettings("dare", rng_seed=1), "w", seed, members))


def test_dare_drops_other_entries_for_every_expert() -> None:
    seed = torch.zeros(1000)
    found = merge(MergeSettings("dare"), "w", seed, {"a": seed + 1, "b": seed + 10})
    assert {1.0, 10.0, 11.0, 0.0} == set(found.tolist())


def test_weighted_is_the_normalised_sum() -> None:
    seed, members = models()
    weights = {"a": 3.0, "b": 1.0, "generalist": 0.0}
    found = merge(MergeSettings("weighted", weights=weights), "w", seed, members)
    assert torch.allclose(found, 0.75 * members["a"] + 0.25 * members["b"], atol=1e-6)
    equal = merge(MergeSettings("weighted", weights=dict.fromkeys(members, 2.0)), "w", seed, members)
    assert torch.allclose(equal, merge(MergeSettings(), "w", seed, members), atol=1e-6)


def test_seed_is_the_seed_models_tensor_bit_for_bit() -> None:
    seed, members = models(dtype=torch.bfloat16)
    assert torch.equal(merge(MergeSettings("seed"), "w", seed, members), seed)


def settings_of(method: str, members: dict[str, Tensor]) -> MergeSettings:
    return MergeSettings(method, weights=dict.fromkeys(members, 1.0) if method == "weighted" else None)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(MERGE_METHODS)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_every_method_leaves_equal_models_as_they_are(method: str, dtype: torch.dtype, noise: int) -> None:
    tensor = torch.randn(5, 9, generator=torch.Generator().manual_seed(noise)).to(dtype)
    members = {"a": tensor, "generalist": tensor}
    found = merge(settings_of(method, members), "w", tensor, members)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), tensor.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", sorted(MERGE_METHODS))
def test_every_method_computes_in_float32_and_rounds_once(method: str) -> None:
    seed, members = models(2, shape=(64, 8), dtype=torch.bfloat16)
    chosen = settings_of(method, members)
    precise = merge(chosen, "w", seed.float(), {name: member.float() for name, member in members.items()})
    assert torch.equal(merge(chosen, "w", seed, members), precise.bfloat16())


@pytest.mark.parametrize("method", sorted(MERGE_METHODS))
def test_no_method_changes_its_inputs(method: str) -> None:
    seed, members = models(2)
    before = seed.clone(), {name: member.clone() for name, member in members.items()}
    merge(settings_of(method, members), "w", seed, members)
    assert torch.equal(seed, before[0])
    assert all(torch.equal(members[name], before[1][name]) for name in members)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (MergeSettings("median"), "there are: mean, seed, weighted, slerp, ties, dare"),
        (MergeSettings("slerp"), "exactly two models"),
        (MergeSettings("mean", density=0.5), "mean takes no density"),
        (MergeSettings("ties", weights={"a": 1.0}), "takes: density, scale"),
        (MergeSettings("ties", density=0.0), "density is 0.0"),
        (MergeSettings("weighted", weights={"a": 1.0, "b": 1.0}), "none for generalist"),
        (MergeSettings("weighted", weights={"a": 1, "b": 1, "generalist": 1, "x": 1}), "no expert x"),
        (MergeSettings("weighted", weights={"a": 0.0, "b": 0.0, "generalist": 0.0}), "above 0"),
        (MergeSettings("weighted", weights={"a": -1.0, "b": 3.0, "generalist": 0.0}), "negative"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_what_is_allowed(wrong: MergeSettings, message: str) -> None:
    seed, members = models()
    with pytest.raises(CheckpointError, match=message):
        merge(wrong, "w", seed, members)
