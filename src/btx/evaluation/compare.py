"""`btx compare`: differences of a run's models and how sure they are, by paired bootstrap over documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from btx.errors import RunFolderError, UserError
from btx.evaluation.harness_files import requests_of
from btx.reporting.paired_bootstrap import RESAMPLES, compare_documents, read_documents
from btx.run_folder.folder import RunFolder


def compare_models(
    run_folder: Path, model: str = "btx", other: str | None = None, *, other_run: Path | None = None,
    resamples: int = RESAMPLES, rng_seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Differences of a run's model to the run's others, or to another run's, from evaluate/documents.json.

    Args:
        model: name of the first model in the results.
        other: name of the second; None: every other.
        other_run: an evaluated run that the others are taken from, a sweep's variant for example; None: the same run.
        rng_seed: random number seed of the draws, which are the same for every pair of models.

    Returns:
        {"model", "resamples", "rng_seed", "models": {OTHER: {"mean", "learning", "keeping", "domains": {D: ...},
        "mixed" (if measured), "tasks": {T: ...}}}}, each a `Difference`, model minus other: bits per byte
        (negative: the model is better), for tasks shares of right answers (positive: the model is better). "mean" is
        that of the domains, "learning" of those with a branch, "keeping" of the others (where there are both). Of two
        runs with other branches, a domain that only one of them has a branch of is in neither.

    Raises:
        RunFolderError: a run is not evaluated, or by an older version.
        UserError: no such model, fewer than 100 resamples, or two runs that were measured on different documents.
    """
    ours = _documents(run_folder)
    theirs = ours if other_run is None else _measured_alike(run_folder, ours, other_run)
    for folder, documents, name in ((run_folder, ours, model), (other_run or run_folder, theirs, other)):
        if name is not None and name not in documents["models"]:
            raise UserError(f"{folder} has no results of a model {name!r}; there are: {', '.join(documents['models'])}")
    if resamples < 100:
        raise UserError(f"resamples is {resamples}; intervals of 95 % need at least 100")
    branches, others_branches = (set(RunFolder.open(folder).recipe.train.domains)
                                 for folder in (run_folder, other_run or run_folder))  # fmt: skip
    others = [name for name in theirs["models"] if other_run is not None or name != model] if other is None else [other]
    return {
        "model": model, "resamples": resamples, "rng_seed": rng_seed,
        "models": {name: compare_documents(ours["models"][model], theirs["models"][name], ours["bytes"],
                                           branches=branches & others_branches, neither=branches ^ others_branches,
                                           resamples=resamples, rng_seed=rng_seed)
                   for name in others},
    }  # fmt: skip


def _documents(run_folder: Path) -> dict[str, Any]:
    """What evaluate/documents.json of a run says."""
    path = run_folder / "evaluate" / "documents.json"
    documents = read_documents(path)
    if documents is None:
        raise RunFolderError(f"{path}: there are no scores of single documents; `btx evaluate {run_folder}` first, and "
                             f"remove {run_folder / 'evaluate'} before if it was made by an older version")  # fmt: skip
    return documents


def _measured_alike(run_folder: Path, ours: dict[str, Any], other_run: Path) -> dict[str, Any]:
    """The other run's scores, without the tasks in which it was asked other questions."""
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
