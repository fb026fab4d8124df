"""What a model folder must look like before anything in it is read. Plain Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from btx.errors import CheckpointError
from btx.system_errors import blame

BTM_FILE = "btm.json"
"""In place of a config and weights: the folder names the models that Branch-Train-Merge runs side by side."""


def check_model(path: str | Path) -> dict[str, Any] | None:
    """The config of a model folder, as `check_model_folder`; None for what can only be a hub name.

    Raises:
        CheckpointError: as there, and for a path where there is nothing.
    """
    if Path(path).exists():
        return check_model_folder(Path(path))
    if isinstance(path, Path) or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise CheckpointError(f"{path}: there is no such folder")
    return None


def check_model_or_btm(path: str | Path) -> None:
    """Refuse a folder that holds neither a model nor Branch-Train-Merge's; hub names are left for the hub."""
    if not (Path(path) / BTM_FILE).is_file():
        check_model(path)


def check_model_folder(folder: Path) -> dict[str, Any]:
    """The config of a model folder, refused early if the folder cannot be a model that is safe to read.

    Raises:
        CheckpointError: no such folder, no or broken config.json, weights missing or pickled.
    """
    if not folder.exists():
        raise CheckpointError(f"{folder}: there is no such folder")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a model is a folder, as save_pretrained writes it; this is a file")
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: this folder holds no model: config.json is missing")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        blame(error)
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(f"{file}: no model_type: this is no transformers model")
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")):
            raise CheckpointError(
                f"{folder}: only pickled weights (.bin), which can run code when read; convert them once with "
                f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) in an environment you trust"
            )
        raise CheckpointError(f"{folder}: no weights: there is no .safetensors file")
    return config
