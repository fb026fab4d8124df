"""`btx evaluate --task`: one task of lm-evaluation-harness, on any model folder or on every model of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx.errors import UserError
from btx.evaluation.harness import Harness
from btx.evaluation.harness_files import TaskRequest
from btx.model_files.hub import shown_name
from btx.model_files.model_folder import check_model_or_btm
from btx.number_texts import score_text
from btx.outputs import check_model_of_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from btx.models.outputs import SideBySide


def evaluate_task(
    where: Path, request: TaskRequest, *, allow_code_execution: bool, log: Callable[[str], None]
) -> dict[str, Any]:
    """Measure a model, or all finished models of a run, on one task; nothing is written.

    Args:
        where: run folder, model folder or hub name.
        allow_code_execution: whether programs that the models write may run.

    Returns:
        {"models": {NAME: {"tasks": {TASK: entry}}}}, as in results.json.

    Raises:
        UserError: no such task, model or file; what is wrong with each.
    """
    if not (where / "recipe.yaml").is_file():
        check_model_or_btm(_name_or_folder(where))
    harness = Harness([request], allow_code_execution=allow_code_execution)
    from btx.models.loading import load_tokenizer  # here, so that what is refused before is refused at once

    if harness.note:
        log(harness.note)
    results: dict[str, Any] = {"models": {}}
    for name, path, load in _models(where, log):
        score = harness.measure(load(), load_tokenizer(path))[request.label]
        entry = results["models"].setdefault(name, {"tasks": {}})["tasks"][request.label] = score.as_json()
        error = f" ± {100 * score.stderr:.1f}" if score.stderr is not None else ""
        cut = f"; {score.truncated} prompts did not fit and lost their beginning" if score.truncated else ""
        log(f"{name}: {request.label} {score.metric} {score_text(entry)}{error} ({score.n} documents, {score.shots} "
            f"shots{cut})")  # fmt: skip
    return results


def _models(
    where: Path, log: Callable[[str], None]
) -> Iterator[tuple[str, str | Path, Callable[[], PreTrainedModel | SideBySide]]]:
    """Name, path and loader of each model."""
    if not (where / "recipe.yaml").is_file():
        from btx.evaluation.any_model import load_any

        path = _name_or_folder(where)
        yield shown_name(path), path, partial(load_any, path, log)
        return
    from btx.baselines.btm_model import load_model_or_btm
    from btx.models.device import measuring_place
    from btx.run_folder.finished_models import finished_models, tell_stale
    from btx.run_folder.folder import RunFolder

    run = RunFolder.open(where)
    models = finished_models(run)
    if not models:
        raise UserError(f"{where}: this run has no finished model yet; `btx status {where}` shows how far it is")
    tell_stale(run, models, log)
    place = measuring_place(run.recipe, log, answers=True)
    for model in models:
        check_model_of_stage(model.folder)
        yield model.name, model.folder, partial(load_model_or_btm, model.folder, place)


def _name_or_folder(where: Path) -> str | Path:
    """What is no folder here may be a hub name."""
    return where if where.exists() else str(where)
