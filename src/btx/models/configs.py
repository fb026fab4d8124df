"""Configs of model folders and hub names as plain values, completed with their class's defaults."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx.choices.families.configs import with_dtype
from btx.choices.routers import RoutingRule
from btx.errors import CheckpointError
from btx.model_files.btx_folder import is_btx_folder, open_btx_folder
from btx.model_files.headers import Headers, has_own_head, main_type
from btx.model_files.model_folder import check_model
from btx.process import quick_imports
from btx.system_errors import blame

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def quiet_transformers() -> None:
    """Errors only, no progress bars: a stage reports on its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@quick_imports()
def read_config(path: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """config.json of a folder or hub name as plain values, completed with the class's defaults.

    Embeddings are tied only if the files do not say otherwise, as in transformers 5: `has_own_head`.
    """
    from transformers import AutoConfig

    config, _ = own_config(path)
    try:
        if config is None:
            config = AutoConfig.from_pretrained(str(path), revision=revision or "main", trust_remote_code=False)
        values: dict[str, Any] = config.to_dict()
    except Exception as error:  # config classes check their values with errors of many types
        blame(error)
        raise CheckpointError(f"{Path(path) / 'config.json'}: this is no model: {error}") from error
    if values.get("tie_word_embeddings") and Path(path).is_dir() and has_own_head(Headers(Path(path))):
        values["tie_word_embeddings"] = False
    return values


def config_text(config: Mapping[str, Any]) -> str:
    """A config as JSON, equal for models of one shape wherever they lie."""
    return json.dumps({key: value for key, value in config.items() if key != "_name_or_path"},
                      sort_keys=True, default=repr)  # fmt: skip


def as_the_files_say(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A config.json without what the tensors beside it contradict: their type, and embeddings that are not tied."""
    headers = Headers(folder)
    main = main_type(headers)
    if (config.get("dtype") or config.get("torch_dtype") or main) != main:
        config = with_dtype(config, main)
    if config.get("tie_word_embeddings") and has_own_head(headers):
        config = config | {"tie_word_embeddings": False}
    return config


def config_defaults(model_type: str) -> dict[str, Any]:
    """The values of a class's config when nothing is said."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type).to_dict()


def completed(make: Callable[[], Mapping[str, Any]], where: str | Path, whose: str) -> dict[str, Any]:
    """A config completed with its class's defaults.

    Args:
        where: where its values are from.
        whose: the class that has to take them, for messages: `the MoE class`.
    """
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.for_model(**make()).to_dict())
    except Exception as error:  # config classes check their values with errors of many types
        blame(error)
        raise CheckpointError(f"{where}: {whose} does not take these values: {error}") from error


def own_config(path: str | Path) -> tuple[PreTrainedConfig | None, RoutingRule | None]:
    """Config and router of a folder that only btx reads; None for any other. Broken folders are refused."""
    from transformers import AutoConfig

    config = check_model(path)
    if config is not None and is_btx_folder(config):
        plain, router = open_btx_folder(Path(path), config)
        return AutoConfig.for_model(**plain), router
    return None, None
