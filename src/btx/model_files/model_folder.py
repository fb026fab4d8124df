"""What a model folder must look like before anything in it is read. Plain Python."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from btx.errors import CheckpointError
from btx.files import read_json
from btx.model_files.adapter_folder import AdapterFolder, is_adapter
from btx.model_files.headers import Headers, check_unquantised
from btx.model_files.hub import check_hub_name
from btx.model_files.mistaken import mistaken_file, mistaken_folder, several_models
from btx.model_files.token_ids import read_object
from btx.outputs import check_model_of_stage

BTM_FILE = "btm.json"
"""In place of a config and weights: the folder names the models that Branch-Train-Merge runs side by side."""


class BtmMembers(TypedDict):
    """btm.json, as far as it says where its models are; more may stand in it."""

    members: dict[str, str]


def check_model(path: str | Path) -> dict[str, Any] | None:
    """The config of a model folder, as `check_model_folder`; None for what can only be a hub name."""
    if Path(path).exists():
        return check_model_folder(Path(path))
    if isinstance(path, Path):
        raise CheckpointError(f"{path}: there is no such folder")
    check_hub_name(path)
    return None


def check_expert_folder(folder: Path) -> None:
    """Refuse what can be no expert: neither a model folder nor a LoRA adapter's."""
    if is_adapter(folder):
        AdapterFolder.open(folder)
    else:
        check_model_folder(folder)


def check_model_or_btm(path: str | Path) -> None:
    """Refuse a folder that holds neither a model nor Branch-Train-Merge's, or one of whose models was damaged; hub
    names are left for the hub."""
    if (Path(path) / BTM_FILE).is_file():
        check_model_of_stage(Path(path))
        members = read_json(Path(path) / BTM_FILE, BtmMembers)["members"]
        for member in members.values():
            check_model_of_stage(Path(os.path.normpath(Path(path).absolute() / member)))
    else:
        check_model(path)


def check_model_folder(folder: Path) -> dict[str, Any]:
    """The config of a model folder, refused early if the folder cannot be a model that is safe to read.

    Raises:
        CheckpointError: no such folder, no or broken config.json, weights missing, broken, pickled or quantised, or
            something else that people give for a model (`btx.model_files.mistaken`).
        RunFolderError: the model is a finished stage's, and a file of it was damaged or replaced.
    """
    if not folder.exists():
        where = f" (a link to {folder.readlink()})" if folder.is_symlink() else ""
        raise CheckpointError(f"{folder}: there is no such folder{where}")
    try:
        mistake = mistaken_folder(folder) if folder.is_dir() else mistaken_file(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from error
    if mistake is not None:
        raise CheckpointError(f"{folder}: {mistake}")
    check_model_of_stage(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: this folder holds no model: config.json is missing")
    config = read_object(file)
    if "model_type" not in config:
        raise CheckpointError(f"{file}: no model_type: this is no transformers model")
    if (mistake := several_models(config)) is not None:
        raise CheckpointError(f"{file}: {mistake}")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: no weights: there is no .safetensors file")
    check_unquantised(folder, config, Headers(folder))
    return config
