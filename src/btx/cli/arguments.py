"""What holds for the arguments of every command: a number is one, and where a folder is taken so is a model of the hub,
`hf:ORG/NAME[@REVISION]`, which is fetched first."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from btx.errors import UserError
from btx.hub_names import is_hub_name
from btx.model_files.hub import local_model

WRITTEN = ("output", "target")
"""Names of parameters that say where something is written."""


def with_arguments_read(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command that is given finite numbers, and the folder here of each path that is a model of the hub.

    It raises CheckpointError for a model that cannot be had, UserError for writing to the hub and for `nan` and `inf`,
    which every range of numbers lets through.
    """

    @wraps(command)
    def with_read(**values: Any) -> Any:
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{name.replace('_', '-')} {value}: a finite number is wanted")
            if isinstance(value, Path) and is_hub_name(value):
                if name in WRITTEN:
                    raise UserError(
                        f"{value}: what is written goes into a folder here; btx push puts a model on the hub"
                    )
                values[name] = local_model(value)
        return command(**values)

    return with_read
