"""Processes of btx that are killed as by `kill -9`, at a chosen moment of what they write; and what a run has come to.

A process is killed as it is about to change something in a stage's folder, or in one beside it: make it, open it for
writing, rename or remove it. What is on the disk then is all that is left of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from btx.files import read_json
from btx.outputs import read_done
from btx.run_folder.folder import RunFolder
from tests.processes import btx

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
TIMES = {"hours", "machine_hours", "hours_ratio", "peak_memory_bytes", "predicted", "eval_tokens_per_s"}
"""Keys of results.json that say how long it took, and on what."""


def on_changes(run: Path, stages: Sequence[str], act: Callable[[str], None]) -> None:
    """Call `act(stage)` whenever this process is about to change something of a stage; it cannot be undone."""
    prefixes = {f"{run}/{stage}/": stage for stage in stages} | {
        f"{run}/{stage.rpartition('/')[0]}/.{stage.rpartition('/')[2]}.".replace("//", "/"): stage for stage in stages
    }

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and isinstance(arguments[0], str | os.PathLike):
            path = os.fspath(arguments[0])
            for prefix, stage in prefixes.items():
                if f"{path}/".startswith(prefix):
                    act(stage)

    sys.addaudithook(hook)


def work_counted(run: str, *stages: str) -> None:
    """`btx work`, and how often it changed something of each stage: {stage: changes} in changes.json."""
    counts: Counter[str] = Counter()
    on_changes(Path(run), stages, lambda stage: counts.update([stage]))
    try:
        btx("work", run, *stages)
    finally:
        (Path(run).parent / "changes.json").write_text(json.dumps(counts))


def work_killed(run: str, within: str, at: int, *stages: str) -> None:
    """`btx work`, killed before its change number `at`, from 1, of one stage."""
    changes = 0

    def kill(stage: str) -> None:
        nonlocal changes
        changes += 1
        if changes == at:
            os.kill(os.getpid(), signal.SIGKILL)

    on_changes(Path(run), [within], kill)
    btx("work", run, *stages)


def outcome(run: RunFolder) -> dict[str, Any]:
    """What a finished run has come to: stage/file → SHA-256 of all it left, and the results; all but times."""
    left: dict[str, Any] = {}
    for stage in run.graph:
        outputs = (read_done(run.folder(stage.name)) or {"outputs": {}})["outputs"]
        left |= {
            f"{stage.name}/{name}": output["sha256"] for name, output in outputs.items()
            if not name.endswith("metrics.jsonl") and stage.name != "evaluate"
        }  # fmt: skip
    return left | {"results": _without_times(read_json(run.folder("evaluate") / "results.json"))}


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(inside) for key, inside in value.items() if key not in TIMES}
    return [_without_times(inside) for inside in value] if isinstance(value, list) else value
