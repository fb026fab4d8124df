"""Models that are not a run's own and are measured beside it: other_models.json of a run folder. It lies outside the
stages, so that it makes none stale and is there when one is made anew. Plain Python.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from btx.errors import UserError
from btx.files import content_sha256, read_json, value_hash, write_json
from btx.model_files.model_folder import BTM_FILE, check_model_or_btm
from btx.recipe.schema import Recipe
from btx.run_folder.finished_models import model_stages
from btx.run_folder.stages_of_recipe import model_files

FILE = "other_models.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class OtherModel(TypedDict):
    """An entry of other_models.json."""

    path: str
    """Folder, absolute, or hub name."""
    inputs: str
    """Hash of what lay there when it was measured."""


def read_other_models(run: Path) -> dict[str, OtherModel]:
    """Name → model; raises as `btx.files.read_json`."""
    models: dict[str, OtherModel] = read_json(run / FILE, dict[str, OtherModel]) or {}
    return {name: with_inputs(model["path"], model["inputs"]) for name, model in models.items()}


def with_inputs(path: str, before: str = "") -> OtherModel:
    """A model as it is now; one whose folder is gone as it was `before`."""
    folder = Path(path)
    if (folder / BTM_FILE).is_file():
        return {"path": path, "inputs": content_sha256(folder / BTM_FILE)}
    files = {Path(name).name: sha256 for name, sha256 in model_files(path).items()}
    is_hub_name = not folder.is_absolute()
    return {"path": path, "inputs": value_hash(files) if files else value_hash(path) if is_hub_name else before}


def check_other_models(recipe: Recipe, models: Mapping[str, str | Path]) -> None:
    """Refuse names that cannot stand beside the run's models, and folders that hold no model.

    Raises:
        UserError: of a name.
        CheckpointError: of a folder.
    """
    ours = {name.replace("/", "__") for name in model_stages(recipe)}  # as files call expert/DOMAIN
    for name, path in models.items():
        if not NAME.fullmatch(name):
            raise UserError(f"--model {name}: a name has letters, digits, `_`, `.` and `-`, 64 at most, and begins "
                            f"with a letter or digit")  # fmt: skip
        if name in ours:
            raise UserError(f"--model {name}: the run has a model of this name; its own: {', '.join(sorted(ours))}")
        check_model_or_btm(path)


def add_other_models(run: Path, models: Mapping[str, str | Path]) -> None:
    """Let models be measured beside a run's from now on; one of the same name gives way."""
    paths = {name: str(path.absolute()) if isinstance(path, Path) else path for name, path in models.items()}
    write_json(run / FILE, read_other_models(run) | {name: with_inputs(path) for name, path in paths.items()})


def forget_other_models(run: Path, names: list[str]) -> None:
    """Measure some no more; raises UserError for one that is not there."""
    left: dict[str, Any] = dict(read_other_models(run))
    for name in names:
        if name not in left:
            raise UserError(f"--forget {name}: no such model beside the run's; there are: {', '.join(left) or 'none'}")
        del left[name]
    write_json(run / FILE, left)
