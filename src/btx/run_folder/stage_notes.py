"""What is noted of a stage: started.json when it is begun, done.json when it is finished; and what can be told of one
whose files, or those of the stages before it, are not here. Plain Python."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any, Literal

from btx.errors import UserError
from btx.outputs import FORMAT
from btx.run_folder.graph import Stage
from btx.run_folder.manifest import now


def started_json(stage: Stage) -> dict[str, Any]:
    """What is noted of a stage when it is begun."""
    read = {needed.label: _noted(needed) for needed in stage.needs if needed.name.startswith("data/")}
    return {"stage": stage.name, **_noted(stage), "upstream": stage.upstream, "read": read}


def _noted(stage: Stage) -> dict[str, Any]:
    """What is noted of a stage itself; of the data that it reads too, for the day when their folder is not there."""
    files = files_of(stage)
    return {"format": FORMAT, "inputs": stage.inputs, "settings": stage.settings, "shown": stage.shown, "files": files}


def done_json(stage: Stage, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is noted of a stage when it is finished; tokens, FLOPs and seconds are 0 unless `facts` have them."""
    nothing = {"tokens": 0, "flops": 0.0, "wall_s": 0.0}
    named = {"stage": stage.name, "inputs": stage.inputs}
    return named | nothing | dict(facts) | {"node": platform.node(), "finished": now()}


def files_of(stage: Stage) -> dict[str, str]:
    """Files of a stage → SHA-256; as recorded if they are not here."""
    try:
        return stage.files()
    except UserError:
        return dict(stage.recorded["files"]) if stage.recorded else {}


def is_known(stage: Stage, what: Literal["inputs", "settings"]) -> bool:
    """Whether a stage's hash, or what decides it besides the stages before it, can be told here."""
    try:
        return getattr(stage, what) is not None
    except UserError:
        return False
