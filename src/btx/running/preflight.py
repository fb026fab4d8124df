"""What can be refused before anything is written: plain checks of the recipe against this machine. Plain Python."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from btx.choices.families import FAMILIES, family_of, refuse_longer_sequences
from btx.choices.trainable import without_peft
from btx.data.conversations import data_files, read_rows
from btx.data.document_files import find_files
from btx.errors import CheckpointError, DataError, RunFolderError, UserError
from btx.evaluation.harness_checks import check_harness
from btx.evaluation.harness_files import requests_of
from btx.evaluation.questions import read_questions
from btx.files import read_json
from btx.mixing.chosen_tokenizer import tokenizer_folder
from btx.model_files.beside_weights import check_links
from btx.model_files.hub import check_hub_name
from btx.model_files.model_folder import check_model_folder
from btx.model_files.token_ids import read_vocabulary
from btx.model_files.vocabularies import check_ids, missing_packages
from btx.planning.processes import check_processes
from btx.recipe.align import Alignment
from btx.recipe.schema import Recipe
from btx.recipe.training import Train
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.stages_of_recipe import task_files
from btx.training.eight_bit import check_installed
from btx.training.trackers.follow import check_trackers


def preflight(recipe: Recipe) -> None:
    """Refuse a recipe that cannot work here.

    Raises:
        DataError: a domain's or task's file is missing, or a line of a task's file is broken.
        RecipeError: sequences are longer than what the seed model reads at once; or several processes cannot share a
            training.
        CheckpointError: the seed model's folder is no model, of a family that cannot be mixed, or its tokenizer does
            not fit it.
        RunFolderError: the run folder lies where nothing can be written, or the disk is full.
        UserError: a task of lm-evaluation-harness cannot be measured here.
    """
    run = RunFolder(Path(recipe.run_folder), recipe)
    measures = run.state(run.graph["evaluate"]) != "done"
    _check_files(run, task_files(recipe) if measures else {})
    if measures:
        _check_tasks(recipe)
    _check_conversations(run)
    check_harness(requests_of(recipe), allow_code_execution=recipe.evaluate.harness.allow_code_execution)
    _check_seed_model(run)
    _check_chosen_tokenizer(recipe)
    if any(recipe.launch.processes_of(stage.name) > 1 for stage in run.graph):
        left = [stage.name for stage in run.graph if run.is_to_make(stage)]
        check_processes(recipe, left=left)
    _check_run_folder(run.path)


def check_packages(recipe: Recipe) -> None:
    """Refuse to begin a run whose trainings need a package that is not installed; a plan needs none.

    Raises:
        UserError: with what to install.
    """
    run = RunFolder(Path(recipe.run_folder), recipe)
    left = [stage for stage in run.graph if run.state(stage) != "done"]
    if any(stage.is_tracked for stage in left):
        check_trackers(recipe.track)
    if any(stage.trains for stage in left):
        trainings = {"seed_model.train": recipe.seed_model.train, "train": recipe.train, "finetune": recipe.finetune}
        for where, training in trainings.items():
            if training is not None:
                check_installed(training.optimizer, f"{where}.")
    with_adapters: dict[str, tuple[str, Train | Alignment]] = {"train": ("train/", recipe.train)}
    with_adapters |= {f"align.{name}": (f"align/{name}", section) for name, section in recipe.alignments.items()}
    for where, (stages, section) in with_adapters.items():
        trains = section.trainable == "lora" and any(stage.name.startswith(stages) for stage in left)
        if trains and find_spec("peft") is None:
            raise UserError(without_peft(where))


def begin(recipe: Recipe) -> RunFolder:
    """The run folder of a recipe and nothing in it, for jobs that somebody else starts; of one that is there already,
    its recipe is this one from now on.

    Raises:
        UserError: as `preflight` and `check_packages`; or a `btx run` is at work in the folder.
    """
    preflight(recipe)
    check_packages(recipe)
    with exclusive(Path(recipe.run_folder), "run"):
        return RunFolder.create(recipe)


def _check_files(run: RunFolder, needed: Mapping[str, Path]) -> None:
    """Every file the run will read; of domains that are prepared, nothing is needed any more."""
    recipe = run.recipe
    missing = [f"{where}: {path}: no such file or folder" for where, path in needed.items() if not path.exists()]
    for name, domain in recipe.data.domains.items():
        if not run.is_to_make(run.graph[f"data/{name}"]):
            continue
        for path in (*(source.path for source in domain.sources), domain.held_out):
            try:
                find_files(path, recipe.data.root) if path is not None else None
            except DataError as error:
                missing.append(f"data.domains.{name}: {error}")
    if missing:
        raise DataError("\n".join(missing))


def _check_tasks(recipe: Recipe) -> None:
    """Every line of the tasks' files that will be asked."""
    for name, task in recipe.evaluate.tasks.items():
        try:
            if task.path is not None:
                read_questions(task, rng_seed=recipe.rng_seed, root=recipe.data.root)
        except DataError as error:
            raise DataError(f"evaluate.tasks.{name}: {error}") from error


def _check_conversations(run: RunFolder) -> None:
    """Every line of the files of `align` that are still to be trained on."""
    recipe = run.recipe
    for stage in run.graph.aligned:
        name = stage.name.removeprefix("align/")
        if run.state(stage) == "done":
            continue
        section = recipe.alignments[name]
        for _ in read_rows(data_files(section, recipe.data.root, name), pairs=section.PAIRS):
            pass


def _check_seed_model(run: RunFolder) -> None:
    seed, length = run.recipe.seed_model, run.recipe.data.sequence_length
    if seed.config is not None:
        refuse_longer_sequences(seed.config, length, "seed_model.config")
    if run.recorded("seed") and not run.is_to_make(run.graph["seed"]):
        # It is in the run folder and its family was checked when it came there.
        file = run.model("seed") / "config.json"
        if any(stage.trains and run.state(stage) != "done" for stage in run.graph):
            refuse_longer_sequences(read_json(file) or {}, length, str(file))
        return
    if seed.config is not None:
        _check_family(seed.config, "seed_model.config")
    elif seed.path is not None and Path(seed.path).exists():
        folder = Path(seed.path)
        config = check_model_folder(folder)
        _check_family(config, seed.path)
        _check_tokenizer(folder, config.get("vocab_size"))
        refuse_longer_sequences(config, length, f"{seed.path}/config.json")
    elif seed.path is not None:
        try:
            check_hub_name(seed.path, revision=seed.revision, ask=seed.plan_config is None)
        except CheckpointError as error:
            raise CheckpointError(f"seed_model.path: {error}") from error
    if seed.plan_config is not None:
        _check_family(seed.plan_config, "seed_model.plan_config")
        refuse_longer_sequences(seed.plan_config, length, "seed_model.plan_config")


def _check_family(config: dict[str, Any], where: str) -> None:
    family = family_of(config, where)
    if not family.finetunes:
        known = ", ".join(sorted({entry.dense for entry in FAMILIES if entry.finetunes}))
        raise CheckpointError(
            f"{where}: {family.dense} mixes into {family.moe}, which btx cannot finetune yet; mix it with `btx mix` "
            f"and finetune it elsewhere, or start from one of: {known}"
        )


def _check_tokenizer(folder: Path, rows: Any) -> None:
    """What makes a tokenizer useless for training a model with so many rows in its embedding."""
    check_links(folder)
    if read_vocabulary(folder) is None:
        raise CheckpointError(
            f"{folder}: no tokenizer: text cannot become tokens; copy the model's tokenizer files there"
        )
    if (missing := missing_packages(folder)) is not None:
        raise CheckpointError(missing)
    if isinstance(rows, int):
        check_ids(folder, rows)


def _check_chosen_tokenizer(recipe: Recipe) -> None:
    """`mix.tokenizer_from` is needed when all experts are trained; what it names is looked at before."""
    chosen, seed = recipe.mix.tokenizer_from, Path(recipe.seed_model.path or "")
    if chosen is not None and chosen != "seed" and chosen not in recipe.train.domains:
        try:
            tokenizer_folder(chosen, seed, dict.fromkeys(recipe.train.domains, seed))
        except CheckpointError as error:
            raise CheckpointError(f"mix.tokenizer_from: {error}") from error


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
