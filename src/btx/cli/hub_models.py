"""Where a command takes a folder it takes a model of the hub, `hf:ORG/NAME[@REVISION]`, which is fetched first."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from btx.errors import UserError
from btx.hub_names import is_hub_name
from btx.model_files.hub import local_model

WRITTEN = ("output", "target")
"""Names of parameters that say where something is written."""


def with_hub_models(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose paths may each be a model of the hub; it is given the model's folder here.

    It raises CheckpointError for a model that cannot be had, UserError for writing to the hub.
    """

    @wraps(command)
    def with_folders(**values: Any) -> Any:
        for name, value in values.items():
            if isinstance(value, Path) and is_hub_name(value):
                if name in WRITTEN:
                    raise UserError(
                        f"{value}: what is written goes into a folder here; btx push puts a model on the hub"
                    )
                values[name] = local_model(value)
        return command(**values)

    return with_folders
