"""How sure is it that one model is better than another? Paired bootstrap over documents and questions.

Both models read the same documents, and a hard document is hard for both: standard errors of each model's mean say
little about their difference. So documents are drawn with replacement, both models are scored on the same draw, and
the spread of the difference over many draws is its uncertainty (Efron and Tibshirani 1993, chapter 13; Koehn 2004 for
texts). This is the uncertainty over held-out text for the models of one run; what another rng seed would have trained
is in `btx.evaluation.aggregate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from btx.errors import RunFolderError, UserError
from btx.evaluation.harness_files import requests_of
from btx.files import MEND
from btx.outputs import read_output
from btx.run_folder.folder import RunFolder

RESAMPLES = 2000
DRAWS_AT_ONCE = 2**22
"""Documents drawn at once: 64 MiB of indices and values."""


class Sizes(TypedDict):
    """UTF-8 bytes of every document."""

    domains: dict[str, list[float]]
    mixed: NotRequired[list[float]]


class Scores(Sizes):
    """Bits of every document, and whether each answer was right."""

    tasks: dict[str, list[float]]


class Documents(TypedDict):
    """evaluate/documents.json."""

    bytes: Sizes
    models: dict[str, Scores]


@dataclass(frozen=True)
class Difference:
    """A difference of two models on one set."""

    difference: float
    """First minus second model, on all documents."""
    low: float
    """2.5th percentile of the resampled differences."""
    high: float
    """97.5th percentile."""
    p: float
    """Two-sided: twice the share of resamples on the other side of 0, never below 2 / (resamples + 1)."""

    def as_json(self) -> dict[str, float]:
        """As `btx compare --json` has it."""
        return {"difference": self.difference, "low": self.low, "high": self.high, "p": self.p}


def compare_models(
    run_folder: Path, model: str = "btx", other: str | None = None, *, other_run: Path | None = None,
    resamples: int = RESAMPLES, rng_seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Differences of a run's model to the run's others, or to another run's, from evaluate/documents.json.

    Args:
        run_folder: an evaluated run.
        model: name of the first model in the results.
        other: name of the second; None: every other.
        other_run: an evaluated run that the others are taken from, a sweep's variant for example; None: the same run.
        resamples: draws of documents.
        rng_seed: random number seed of the draws, which are the same for every pair of models.

    Returns:
        {"model", "resamples", "rng_seed", "models": {OTHER: {"mean", "domains": {D: ...}, "mixed" (if measured),
        "tasks": {T: ...}}}}, each a `Difference` as JSON, model minus other: bits per byte (negative: the model is
        better), for tasks shares of right answers (positive: the model is better). "mean" is that of the domains.

    Raises:
        RunFolderError: a run is not evaluated, or by an older version.
        UserError: no such model, fewer than 100 resamples, or two runs that were measured on different documents.
    """
    ours = _documents(run_folder)
    theirs = ours if other_run is None else _measured_alike(run_folder, ours, other_run)
    for folder, found, name in ((run_folder, ours, model), (other_run or run_folder, theirs, other)):
        if name is not None and name not in found["models"]:
            raise UserError(f"{folder} has no results of a model {name!r}; there are: {', '.join(found['models'])}")
    if resamples < 100:
        raise UserError(f"resamples is {resamples}; intervals of 95 % need at least 100")
    others = [name for name in theirs["models"] if other_run is not None or name != model] if other is None else [other]
    return {
        "model": model, "resamples": resamples, "rng_seed": rng_seed,
        "models": {name: compare_documents(ours["models"][model], theirs["models"][name], ours["bytes"],
                                           resamples=resamples, rng_seed=rng_seed) for name in others},
    }  # fmt: skip


def _documents(run_folder: Path) -> dict[str, Any]:
    """What evaluate/documents.json of a run says."""
    path = run_folder / "evaluate" / "documents.json"
    found = read_output(path, Documents)
    if found is None:
        raise RunFolderError(f"{path}: there are no scores of single documents; `btx evaluate {run_folder}` first, and "
                             f"remove {run_folder / 'evaluate'} before if it was made by an older version")  # fmt: skip
    sizes = {"mixed": found["bytes"].get("mixed", []), **found["bytes"]["domains"]}
    for name, scores in found["models"].items():
        for key, bits in ({"mixed": scores.get("mixed", sizes["mixed"])} | scores["domains"]).items():
            if len(bits) != len(sizes.get(key, ())):
                raise RunFolderError(f"{path}: models.{name}: {key} has {len(bits)} documents, bytes has "
                                     f"{len(sizes.get(key, ()))}; {MEND}")  # fmt: skip
    return dict(found)


def _measured_alike(run_folder: Path, ours: dict[str, Any], other_run: Path) -> dict[str, Any]:
    """The other run's scores, without the tasks in which it was asked other questions.

    Raises:
        UserError: its held-out documents are other ones.
    """
    theirs = _documents(other_run)
    if theirs["bytes"] != ours["bytes"]:
        raise UserError(
            f"{run_folder} and {other_run} were measured on different documents, which cannot be paired: data, "
            f"tokenizer, evaluate.tokens, evaluate.mixed and rng_seed have to be the same"
        )
    first, second = RunFolder.open(run_folder).recipe, RunFolder.open(other_run).recipe
    alike = first.rng_seed == second.rng_seed  # which draws the questions
    same = {name for name, task in first.evaluate.tasks.items() if alike and second.evaluate.tasks.get(name) == task}
    same |= {request.label for request in requests_of(first) if alike and request in requests_of(second)}
    for scores in theirs["models"].values():
        scores["tasks"] = {name: right for name, right in scores["tasks"].items() if name in same}
    return theirs


def compare_documents(
    first: Mapping[str, Any], second: Mapping[str, Any], document_bytes: Mapping[str, Any], *,
    resamples: int = RESAMPLES, rng_seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Differences of two models' entries in documents.json, set by set; sets that one of them lacks are left out.

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
    result: dict[str, Any] = {
        "mean": _summary(np.mean(list(domains.values()), axis=0)).as_json(),
        "domains": {name: _summary(values).as_json() for name, values in domains.items()},
        "tasks": {
            name: _summary(drawn(name, right, second["tasks"][name], [1.0] * len(right))).as_json()
            for name, right in first["tasks"].items()
            if name in second["tasks"]
        },
    }
    if "mixed" in first and "mixed" in second:
        result["mixed"] = _summary(drawn("mixed", first["mixed"], second["mixed"], document_bytes["mixed"])).as_json()
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


def _summary(ratios: np.ndarray) -> Difference:
    """Of the difference and its resamples, as `resampled_ratios` returns them."""
    difference, resampled = float(ratios[0]), ratios[1:]
    low, high = np.percentile(resampled, (2.5, 97.5))
    one_sided = min((resampled <= 0).sum(), (resampled >= 0).sum())
    return Difference(difference, float(low), float(high), min(1.0, 2 * float(one_sided + 1) / (len(resampled) + 1)))
