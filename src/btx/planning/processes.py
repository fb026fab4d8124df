"""What several processes could not train as one would is refused before anything runs. Plain Python."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from btx.baselines.settings import phases_of, routing_of
from btx.choices.baselines import BASELINES
from btx.choices.routers import RoutingRule
from btx.errors import RecipeError
from btx.files import read_json
from btx.planning.aligned import aligned_settings
from btx.recipe.schema import Recipe
from btx.recipe.training import Training
from btx.training.parallel import has_dropout, why_not_shared


def check_processes(recipe: Recipe, *, left: Collection[str] | None = None) -> None:
    """Refuse `launch.processes` for a training that they cannot share.

    Args:
        left: stages that are still to be trained; None: all.

    Raises:
        RecipeError: names the settings.
    """
    dropout = has_dropout(_seed_config(recipe))
    for where, stage, settings, router in _trainings(recipe):
        if left is not None and stage not in left:
            continue
        processes = recipe.launch.processes_of(stage)
        problem = why_not_shared(
            settings, recipe.data.sequence_length, processes, router=router, has_dropout=dropout
        )  # fmt: skip
        if problem is not None:
            raise RecipeError(f"launch.processes: {processes} for {stage}: {where}.{problem}")


def _trainings(recipe: Recipe) -> Iterator[tuple[str, str, Training, RoutingRule | None]]:
    """Section of the recipe, stage, settings and router of each training."""
    if recipe.seed_model.train is not None:
        yield "seed_model.train", "seed", recipe.seed_model.train, None
    for domain in recipe.train.domains:
        yield "train", f"train/{domain}", recipe.branch_training(domain), None
    yield "finetune", "finetune", recipe.finetune, recipe.routing
    for stage, settings in aligned_settings(recipe).items():
        yield stage.replace("/", "."), stage, settings, recipe.routing
    for name in recipe.baselines:
        for phase in phases_of(recipe, name):
            section = "train" if phase.data == "domains" else "finetune"
            router = routing_of(recipe, name) if BASELINES[name].has_routers else None
            yield f"baseline_training.{name} or {section}", phase.stage, phase.settings, router


def _seed_config(recipe: Recipe) -> Mapping[str, Any]:
    """What is known of the seed model's config before anything runs."""
    seed = recipe.seed_model
    return seed.config or seed.plan_config or read_json(Path(seed.path or "") / "config.json") or {}
