"""What can be refused before anything is written: plain checks of the recipe against this machine. Plain Python."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from btx.choices.families import FAMILIES, family_of
from btx.data.document_files import find_files
from btx.errors import CheckpointError, DataError, RunFolderError
from btx.evaluation.harness_checks import check_harness
from btx.evaluation.harness_files import requests_of
from btx.model_files.hub import check_hub_name
from btx.model_files.model_folder import check_model_folder
from btx.recipe.schema import Recipe
from btx.run_folder.folder import RunFolder
from btx.run_folder.stages_of_recipe import task_files


def preflight(recipe: Recipe) -> None:
    """Refuse a recipe that cannot work here.

    Raises:
        DataError: a domain's or task's file is missing.
        CheckpointError: the seed model's folder is no model, or of a family that cannot be mixed.
        RunFolderError: the run folder lies where nothing can be written, or the disk is full.
        UserError: a task of lm-evaluation-harness cannot be measured here.
    """
    _check_files(recipe)
    check_harness(requests_of(recipe), allow_code_execution=recipe.evaluate.harness.allow_code_execution)
    _check_seed_model(recipe)
    _check_run_folder(Path(recipe.run_folder))


def _check_files(recipe: Recipe) -> None:
    """Every file the run will read; of domains that are prepared, nothing is needed any more."""
    run = RunFolder(Path(recipe.run_folder), recipe)
    needed = {} if run.state(run.graph["evaluate"]) == "done" else task_files(recipe)
    missing = [f"{where}: {path}: no such file or folder" for where, path in needed.items() if not path.exists()]
    for name, domain in recipe.data.domains.items():
        if run.state(run.graph[f"data/{name}"]) == "done" or not run.is_needed(run.graph[f"data/{name}"]):
            continue
        for path in (*(source.path for source in domain.sources), domain.held_out):
            try:
                find_files(path, recipe.data.root) if path is not None else None
            except DataError as error:
                missing.append(f"data.domains.{name}: {error}")
    if missing:
        raise DataError("\n".join(missing))


def _check_seed_model(recipe: Recipe) -> None:
    seed = recipe.seed_model
    if RunFolder(Path(recipe.run_folder), recipe).recorded("seed"):
        return  # it is in the run folder and was checked when it came there
    if seed.config is not None:
        _check_family(seed.config, "seed_model.config")
    elif seed.path is not None and Path(seed.path).expanduser().exists():
        _check_family(check_model_folder(Path(seed.path).expanduser()), seed.path)
    elif seed.path is not None:
        try:
            check_hub_name(seed.path, revision=seed.revision, ask=seed.plan_config is None)
        except CheckpointError as error:
            raise CheckpointError(f"seed_model.path: {error}") from error
    if seed.plan_config is not None:
        _check_family(seed.plan_config, "seed_model.plan_config")


def _check_family(config: dict[str, Any], where: str) -> None:
    family = family_of(config, where)
    if not family.finetunes:
        known = ", ".join(sorted({entry.dense for entry in FAMILIES if entry.finetunes}))
        raise CheckpointError(
            f"{where}: {family.dense} mixes into {family.moe}, which btx cannot finetune yet; mix it with `btx mix` "
            f"and finetune it elsewhere, or start from one of: {known}"
        )


def _check_run_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path}: the run folder is a file; choose another with run=FOLDER")
    if path.is_dir() and any(path.iterdir()) and not (path / "recipe.yaml").exists() and not (path / ".locks").exists():
        raise RunFolderError(f"{path}: this folder holds something else than a run; choose another with run=FOLDER")
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise RunFolderError(f"{path}: {parent} is a file, no folder can be in it; choose another with run=FOLDER")
    if shutil.disk_usage(parent).free < 50_000_000:
        raise RunFolderError(f"{parent}: the disk is full (less than 50 MB free)")
