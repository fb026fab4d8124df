"""How sure is it that one model is better than another? Paired bootstrap over documents and questions.

Both models read the same documents, and a hard document is hard for both: standard errors of each model's mean say
little about their difference. So documents are drawn with replacement, both models are scored on the same draw, and
the spread of the difference over many draws is its uncertainty (Efron and Tibshirani 1993, chapter 13; Koehn 2004 for
texts). This is the uncertainty over held-out text for the models of one run; what another rng seed would have trained
is in `btx.evaluation.aggregate`. Plain Python and numpy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from btx.errors import RunFolderError
from btx.files import MEND
from btx.outputs import read_output
from btx.reporting.shapes import Documents

RESAMPLES = 2000
DRAWS_AT_ONCE = 2**22
"""Documents drawn at once: 64 MiB of indices and values."""
SIGNIFICANT = 0.05
"""A difference with a larger p is told as one that may be chance."""


def may_be_chance(p: float | None) -> bool:
    """Whether a difference is told as one that may be none."""
    return p is not None and p >= SIGNIFICANT


def chance_text(p: float | None) -> str:
    """What is said behind a difference that may be chance; nothing behind another one."""
    return f" (may be chance: p = {p:.2f})" if may_be_chance(p) else ""


class Difference(TypedDict):
    """A difference of two models on one set, as `btx compare --json` has it."""

    difference: float
    """First minus second model, on all documents."""
    low: float
    """2.5th percentile of the resampled differences."""
    high: float
    """97.5th percentile."""
    p: float
    """Two-sided: twice the share of resamples on the other side of 0, never below 2 / (resamples + 1). 1 where a set
    has a single document: drawn anew it is always the same, which tells nothing; the interval then reaches to 0."""


def read_documents(path: Path) -> dict[str, Any] | None:
    """evaluate/documents.json, None if there is none.

    Raises:
        RunFolderError: it is broken, or a model has scores of other documents than there are.
    """
    documents = read_output(path, Documents)
    if documents is None:
        return None
    sizes = documents["bytes"]
    for name, scores in documents["models"].items():
        parts = [(key, bits, sizes["domains"].get(key, ())) for key, bits in scores["domains"].items()]
        parts += [("mixed", scores["mixed"], sizes.get("mixed", ()))] if "mixed" in scores else []
        for key, bits, there in parts:
            if len(bits) != len(there):
                raise RunFolderError(f"{path}: models.{name}: {key} has {len(bits)} documents, bytes has "
                                     f"{len(there)}; {MEND}")  # fmt: skip
    return dict(documents)


def learning_and_keeping(domains: Iterable[str], branches: Collection[str]) -> dict[str, list[str]]:
    """`learning`: the domains that have a branch; `keeping`: all others, general text. Empty where one has none: then
    the mean over the domains says it all."""
    parts: dict[str, list[str]] = {"learning": [], "keeping": []}
    for domain in domains:
        parts["learning" if domain in branches else "keeping"].append(domain)
    return parts if all(parts.values()) else {}


def compare_documents(
    first: Mapping[str, Any], second: Mapping[str, Any], document_bytes: Mapping[str, Any], *,
    branches: Collection[str] = (), neither: Collection[str] = (), resamples: int = RESAMPLES, rng_seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Differences of two models' entries in documents.json, set by set; sets that one of them lacks are left out.

    Args:
        branches: domains that have a branch, for the means of learning and keeping.
        neither: domains that belong to none of these means.

    Returns:
        As an entry of `compare_models`' "models".
    """

    def drawn(name: str, values: Sequence[float], others: Sequence[float], sizes: Sequence[float]) -> np.ndarray:
        gap_N = np.asarray(values, float) - np.asarray(others, float)
        return resampled_ratios(gap_N, np.asarray(sizes, float), resamples, [rng_seed, *name.encode()])

    sizes = document_bytes["domains"]
    domains = {
        name: drawn(name, bits, second["domains"][name], sizes[name])
        for name, bits in first["domains"].items()
        if name in second["domains"]
    }

    def mean_of(names: Sequence[str]) -> Difference:
        means = np.mean([domains[name] for name in names], axis=0)
        return _summary(means, min(len(sizes[name]) for name in names))

    parts = learning_and_keeping([name for name in domains if name not in neither], branches)
    result: dict[str, Any] = {
        "mean": mean_of(list(domains)),
        **{part: mean_of(names) for part, names in parts.items()},
        "domains": {name: mean_of([name]) for name in domains},
        "tasks": {
            name: _summary(drawn(name, right, second["tasks"][name], [1.0] * len(right)), len(right))
            for name, right in first["tasks"].items()
            if name in second["tasks"]
        },
    }
    if "mixed" in first and "mixed" in second:
        drawn_mixed = drawn("mixed", first["mixed"], second["mixed"], document_bytes["mixed"])
        result["mixed"] = _summary(drawn_mixed, len(first["mixed"]))
    return result


def resampled_ratios(value_N: np.ndarray, size_N: np.ndarray, resamples: int, rng_seed: int | list[int]) -> np.ndarray:
    """Σ value / Σ size over N documents, first as they are, then of each resample of N of them: (1 + resamples,).

    The draws depend on N, `resamples` and `rng_seed` only; sets that are averaged need different ones.
    """
    n, random = len(size_N), np.random.default_rng(rng_seed)
    ratios = [np.array([value_N.sum() / size_N.sum()])]
    at_once = max(1, DRAWS_AT_ONCE // n)
    for start in range(0, resamples, at_once):
        drawn_RN = random.integers(0, n, (min(at_once, resamples - start), n))
        ratios.append(value_N[drawn_RN].sum(axis=1) / size_N[drawn_RN].sum(axis=1))
    return np.concatenate(ratios)


def _summary(ratios: np.ndarray, documents: int) -> Difference:
    """Of the difference and its resamples, as `resampled_ratios` returns them; `documents`: of the smallest set."""
    difference, resampled = float(ratios[0]), ratios[1:]
    if documents < 2:
        return {"difference": difference, "low": min(difference, 0.0), "high": max(difference, 0.0), "p": 1.0}
    low, high = np.percentile(resampled, (2.5, 97.5))
    one_sided = min((resampled <= 0).sum(), (resampled >= 0).sum())
    p = min(1.0, 2 * float(one_sided + 1) / (len(resampled) + 1))
    return {"difference": difference, "low": float(low), "high": float(high), "p": p}
