"""The models of a run: which stage makes each, which are finished, and which one is meant by the run's model. Plain
Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from btx.errors import NotYet, RunFolderError
from btx.process import Log
from btx.recipe.schema import Recipe
from btx.run_folder.folder import RunFolder


def model_stages(recipe: Recipe) -> dict[str, str]:
    """Name in the results → the stage that makes the model: seed, expert/<domain>, soup, other baselines, mix, btx,
    and sft and dpo of a recipe with `align`."""
    baselines = sorted(recipe.baselines, key=lambda name: name != "soup")
    return {
        "seed": "seed",
        **{f"expert/{domain}": f"train/{domain}" for domain in recipe.train.domains},
        **{str(name): f"baselines/{name}" for name in baselines},
        "mix": "mix",
        "btx": "finetune",
        **{name: f"align/{name}" for name in recipe.alignments},
    }


def expert_models(run: RunFolder) -> dict[str, Path]:
    """Domain → the model folder that its branch leaves, finished or not."""
    return {domain: run.model(f"train/{domain}") for domain in run.recipe.train.domains}


@dataclass(frozen=True)
class FinishedModel:
    """A model that a stage of the run has finished."""

    name: str
    """In the results."""
    stage: str
    folder: Path
    stale: str
    """Why the stage is stale: the recipe, or what lies before it, says something else by now. Empty if it is done."""


def finished_models(run: RunFolder) -> list[FinishedModel]:
    """The run's models that are finished, stale ones with the reason, in the order in which they are made."""
    models = []
    for name, stage_name in model_stages(run.recipe).items():
        stage, folder = run.graph[stage_name], run.model(stage_name)
        state = run.state(stage)
        if folder.is_dir() and (state == "done" or (state == "stale" and run.done(stage))):
            models.append(FinishedModel(name, stage_name, folder, run.why_stale(stage) if state == "stale" else ""))
    return models


def last_model(run: RunFolder, tell: Log, *, refuse_stale: bool = False) -> FinishedModel:
    """The run's model: of mix, finetune and align the last one that is finished. Which it is, and whether the recipe
    says something else by now, is told.

    Args:
        tell: called with lines for the user.
        refuse_stale: for what is given to others; else a stale model is taken with a warning.

    Raises:
        NotYet: none of them is finished.
        RunFolderError: the last one is stale.
    """
    in_turn = [stage for name, stage in model_stages(run.recipe).items() if name in ("mix", "btx", "sft", "dpo")]
    mixed = [model for model in finished_models(run) if model.stage in in_turn]
    if not mixed:
        raise NotYet(f"{run.path}: no mixed model of this run is finished yet; `btx run {run.path}` goes on")
    last = mixed[-1]
    if last.stale and refuse_stale:
        raise RunFolderError(
            f"{run.path}: {last.stage} is stale ({last.stale}), so its model is not what the recipe says; "
            f"`btx run {run.path}` makes it anew. To give the old one away name its folder: {last.folder}"
        )
    later = ", ".join(in_turn[in_turn.index(last.stage) + 1 :])
    tell(f"{run.path}: the model of {last.stage}" + f" ({later}: not finished yet)" * bool(later))
    tell_stale(run, [last], tell)
    return last


def tell_stale(run: RunFolder, models: Sequence[FinishedModel], tell: Log) -> None:
    """Warn of models that are not what the run's recipe says by now."""
    for model in models:
        if model.stale:
            tell(f"warning: {model.stage} is stale ({model.stale}); `btx run {run.path}` makes it anew")
