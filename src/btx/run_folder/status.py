"""How far each stage of a run is, read from its files. Plain Python."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from btx.errors import RunFolderError
from btx.files import read_json, write_json
from btx.metrics_file import NUMBERS, last_metrics
from btx.outputs import damage
from btx.process import Interrupted
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.run_folder.lease import is_alive, lock_file
from btx.run_folder.manifest import now
from btx.system_errors import told


@dataclass(frozen=True)
class StageStatus:
    """One line of `btx status`."""

    stage: str
    state: str
    """done, damaged (done, but a file is not as it was left), running, failed (and not tried again since), begun
    (started, but nobody is at it), stale, absent; `btx status` also has queued (a job that waits on a cluster)."""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    wall_s: float | None = None
    mfu: float | None = None
    """Share of the devices' peak, where that is known."""
    why: str | None = None
    """For a stale stage what changed, for a failed one its last error line, for a damaged one the file, for a queued
    one why it waits, for a begun one the machine whose process ended without a word."""
    node: str | None = None
    """The machine that is at it, that made it, or on which it failed."""
    processes: int = 1
    """How many train it together, or have; tokens_per_s is of all."""


def stage_status(run: RunFolder, stage: Stage) -> StageStatus:
    """Status of one stage."""
    state: str = run.state(stage)
    if state == "done":
        facts = run.done(stage) or {}
        return StageStatus(stage.name, state, step=facts.get("steps"), steps=facts.get("steps"), loss=facts.get("loss"),
                           wall_s=facts.get("wall_s"), mfu=facts.get("mfu"), node=facts.get("node"),
                           processes=facts.get("processes", 1))  # fmt: skip
    why, node, has_metrics = None, at_work(run.path, stage.name), state == "begun"
    if node is None and (failure := failure_of(run, stage.name)) is not None:
        state, why, node = "failed", failure["error"], failure["node"]
    elif state == "stale":
        return StageStatus(stage.name, state, why=run.why_stale(stage))
    elif node is not None:
        state = "running"
    elif state == "begun" and (lost := owner_of(run.path, stage.name)) is not None:
        why = lost_on(lost[1])
    line = last_metrics(run.folder(stage.name) / "metrics.jsonl") if has_metrics else None
    if line is None or not line.keys() >= NUMBERS - {"loss"} or not line["step"] or not line["tokens_per_s"]:
        return StageStatus(stage.name, state, why=why, node=node)
    remaining_tokens = (line["steps"] - line["step"]) * line["tokens"] / line["step"]
    return StageStatus(
        stage.name, state, line["step"], line["steps"], line.get("loss"), line["tokens_per_s"],
        remaining_tokens / line["tokens_per_s"] if state != "failed" else None, line["wall_s"], line.get("mfu"), why,
        node, line.get("processes", 1),
    )  # fmt: skip


def run_status(run: RunFolder, *, verify: bool = False) -> list[dict[str, Any]]:
    """Status of every stage, in the order they run.

    Args:
        verify: read every file of finished stages whole; else their sizes, and small files.
    """
    rows = []
    for stage in run.graph:
        status = stage_status(run, stage)
        if status.state == "done" and (why := damage(run.folder(stage.name), "whole" if verify else "quick")):
            status = replace(status, state="damaged", why=why)
        rows.append(asdict(status))
    return rows


@contextlib.contextmanager
def trying(run: RunFolder, stage: str) -> Iterator[None]:
    """Try a stage: it has not failed any more, and has if the block ends with an error that is no interruption."""
    forget_failure(run, stage)
    try:
        yield
    except (Interrupted, BrokenPipeError):
        raise
    except Exception as error:
        note_failure(run, stage, str(told(error) or f"{type(error).__name__}: {error}"))
        raise


def note_failure(run: RunFolder, stage: str, error: str, *, node: str | None = None) -> None:
    """Note that a stage failed, the last line of what it said, and on which machine; None: this one."""
    failure = {"error": last_line(error), "node": node or platform.node(), "time": now()}
    with contextlib.suppress(RunFolderError):  # on a full disk
        write_json(_failure_file(run, stage), failure)


def forget_failure(run: RunFolder, stage: str) -> None:
    """A stage is tried again."""
    _failure_file(run, stage).unlink(missing_ok=True)


def last_line(text: str) -> str:
    """The last line of a message that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it left no message")


def failure_of(run: RunFolder, stage: str) -> dict[str, str] | None:
    """{"error", "node", "time"} of a stage that failed when it was last tried, else None."""
    failure = read_json(path := _failure_file(run, stage))
    if failure is not None and not (isinstance(failure, dict) and {"error", "node"} <= failure.keys()):
        raise RunFolderError(f"{path}: not what btx notes of a failure; remove it")
    return cast(dict[str, str] | None, failure)


def _failure_file(run: RunFolder, stage: str) -> Path:
    return lock_file(run.path, stage, "failed.json")


def at_work(folder: Path, work: str) -> str | None:
    """The machine on which a process is at work on a stage of a run folder, or on all of it ("run"), or on a sweep's
    ("sweep"); None if there is none.

    A process shows signs of life (`btx.run_folder.lease`); one of this machine is also looked for.
    """
    import psutil

    try:
        if (owner := owner_of(folder, work)) is None:
            return None
        (pid, node), lives = owner, is_alive(lock_file(folder, work, "lease"))
        if node == platform.node():  # a number may be another process's by now, and a stopped process gives no sign
            lives = psutil.pid_exists(pid) and (lives or psutil.Process(pid).status() == "stopped")
        return node if lives else None
    except (OSError, psutil.Error):
        return None


def lost_on(node: str) -> str:
    """What is said of work whose process has not given it back."""
    return f"its process on {node} ended without a word: it was killed, or the machine is gone"


def owner_of(folder: Path, work: str) -> tuple[int, str] | None:
    """Number and machine of the process that has taken some work and not given it back, alive or not."""
    try:
        pid, _, node = lock_file(folder, work, "pid").read_text("utf-8").partition(" on ")
        return int(pid), node
    except (OSError, ValueError):
        return None
