"""Adopt: an expert model that anything else has trained takes a branch's place in the run."""

from __future__ import annotations

import shutil
from pathlib import Path

from btx.errors import UserError
from btx.files import named_beside, write_sealed
from btx.mixing.checks import open_checked
from btx.mixing.dense_folder import write_expert
from btx.model_files.adapter_folder import is_adapter
from btx.model_files.beside_weights import check_links, copy_beside_weights
from btx.model_files.vocabularies import check_ids
from btx.outputs import STARTED, check_outputs, finish
from btx.process import Log
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.graph import Stage
from btx.run_folder.stage_notes import done_json, started_json
from btx.run_folder.stages_of_recipe import model_files


def adopt(run: RunFolder, domain: str, model: Path, log: Log) -> None:
    """Copy an expert model into `train/<domain>/` as finished: the run never trains this branch, whatever it says.

    It has to fit the run's seed model as `btx mix` wants it. A branch that was trained or begun before is moved to
    stale/ once the copy is complete; removing `train/<domain>` takes the adoption back.

    Args:
        domain: one of the recipe's branches.
        model: folder of a dense model, or of a LoRA adapter of the seed model: what is taken in is the merged model.

    Raises:
        UserError: the recipe has no such branch, the seed model is not there, or the model does not fit it.
    """
    branches, model = run.recipe.train.domains, model.expanduser()
    if domain not in branches:
        raise UserError(
            f"{run.path}: the run has no branch {domain!r}; its train.domains are: {', '.join(branches)}. Add {domain} "
            f"to train.domains and data.domains of its recipe, prepare it (btx run RECIPE --until data), then adopt"
        )
    seed = run.graph["seed"]
    if run.state(seed) != "done":
        raise UserError(f"{run.path}: the seed model is {run.state(seed)}: what is adopted has to fit it. "
                        f"Make it first: btx train {run.path} seed")  # fmt: skip
    check_outputs(run.folder("seed"))
    files = model_files(str(model))
    check_links(model)
    chosen = run.recipe.mix.tokenizer_from
    inputs = open_checked(run.model("seed"), {domain: model}, True, any_tokenizer=chosen is not None, warn=log)
    if chosen == domain:
        check_ids(model, int(inputs.config["vocab_size"]))
    stage = Stage(f"train/{domain}", lambda: {"adopted": {Path(file).name: sha for file, sha in files.items()}})
    with exclusive(run.path, stage.name):
        folder = run.folder(stage.name)
        beside = named_beside(folder, "adopting")
        if beside.exists():
            shutil.rmtree(beside)
        (beside / "model").mkdir(parents=True)
        if is_adapter(model):
            write_expert(inputs, domain, beside / "model")
        else:
            _copy(model, list(map(Path, files)), beside / "model", log)
        _take_in(run, stage, model, beside, log)


def _copy(model: Path, files: list[Path], target: Path, log: Log) -> None:
    copy_beside_weights(model, target, warn=log)
    for file in files:
        if ".safetensors" in file.suffixes:
            shutil.copyfile(file, target / file.name)


def _take_in(run: RunFolder, stage: Stage, model: Path, beside: Path, log: Log) -> None:
    """Let `beside`, whose model is complete, be the branch's folder."""
    folder = run.folder(stage.name)
    write_sealed(beside / STARTED, started_json(stage))
    finish(beside, done_json(stage, {"adopted": {"from": str(model.absolute())}}))
    if folder.exists():
        log(f"{stage.name}: what was there before is in {run.set_aside(stage.name)}")
    beside.rename(folder)
    log(f"{stage.name}: adopted from {model}; it is never trained here")
