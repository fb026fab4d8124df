"""Where a command takes a folder it takes a model of the hub too: `hf:ORG/NAME[@REVISION]`, fetched before it begins."""

from __future__ import annotations

from functools import update_wrapper
from typing import Any

from btx.errors import UserError
from btx.hub_names import is_hub_name
from btx.model_files.hub import local_model

WRITTEN = ("output", "target")
"""Names of parameters that say where something is written."""


def take_hub_names(command: Any) -> None:
    """Let every path that a command of click's takes be a model of the hub; the command is given its folder here.

    The command raises CheckpointError for a model that cannot be had, UserError for writing to the hub.
    """
    paths = [parameter.name for parameter in command.params if parameter.type.name in ("path", "file", "directory")]
    callback = command.callback

    def with_folders(**values: Any) -> Any:
        for name in paths:
            if is_hub_name(values[name]):
                if name in WRITTEN:
                    raise UserError(f"{values[name]}: what is written goes into a folder here; btx push puts a model "
                                    f"on the hub")  # fmt: skip
                values[name] = local_model(str(values[name]))
        return callback(**values)

    if paths:
        command.callback = update_wrapper(with_folders, callback)
