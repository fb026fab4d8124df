"""`btx cancel`: whatever is under way in a run is asked to save and end, wherever it is."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from btx.errors import UserError
from btx.process import SAVE_AND_END, Log
from btx.run_folder.folder import RunFolder
from btx.run_folder.jobs import jobs_of, note_cancelled
from btx.run_folder.status import at_work, owner_of
from btx.running.under_way import UnderWay, job_text


def cancel(run: RunFolder, stages: Sequence[str], log: Log) -> None:
    """Ask jobs to save and end; what they have done stays, and the next `btx run` goes on with it. Returns at once.

    Args:
        stages: those whose jobs are asked; none: all of the run, and a `btx run` on this machine too.
        log: told what was asked of whom.

    Raises:
        UserError: a process of another machine, which can only be asked there; an engine is not here.
        SystemFailed: an engine does not answer.
    """
    under_way = UnderWay(run)
    jobs = [job for job in jobs_of(run) if not stages or set(stages) & set(job.stages)]
    jobs = [job for job, standing in zip(jobs, under_way.poll(jobs), strict=True) if standing.state != "ended"]
    on_cluster = [job for job in jobs if under_way.launcher_of(job.launcher).goes_on]
    for job in jobs:
        note_cancelled(run.path, job)
    queued = {name for job in on_cluster for name in job.stages}
    works = [stage.name for stage in run.graph if (not stages or stage.name in stages) and stage.name not in queued]
    asked, elsewhere = [], []
    for work in (*([] if stages else ["run"]), *works):  # `btx run` first, so that it starts nothing any more
        node, name = at_work(run.path, work), "btx run" if work == "run" else work
        if node == platform.node() and _signal(run.path, work):
            asked.append(name)
        elif node not in (None, platform.node()) and not (work == "run" and on_cluster):
            elsewhere.append(f"{name} on {node}")
    for job in jobs:
        if job not in on_cluster and not set(job.stages) & set(asked):  # just begun, it holds no work yet
            under_way.launcher_of(job.launcher).cancel(job.handle)
            asked.append(job.name)
    for job in reversed(on_cluster):  # so that nothing begins because what it waits for has ended
        under_way.launcher_of(job.launcher).cancel(job.handle)
        asked.append(f"{job.name} ({job_text(job)})")
    log(f"asked to save and end: {', '.join(asked)}" if asked else f"{run.path}: nothing is under way here")
    if elsewhere:
        raise UserError(f"{', '.join(elsewhere)}: can only be ended there, with the same command")


def cancel_sweep(folder: Path, runs: Sequence[Path], log: Log) -> None:
    """Ask a sweep on this machine to end, and all that is under way in its runs; raises as `cancel`."""
    if _signal(folder, "sweep"):
        log("asked to save and end: btx sweep")
    for run in runs:
        if (run / "recipe.yaml").is_file():
            cancel(RunFolder.open(run), (), lambda line: log(f"{run}: {line}"))  # noqa: B023


def _signal(folder: Path, work: str) -> bool:
    """Ask the process of this machine that holds some work to save and end; False if there is none."""
    owner = owner_of(folder, work)
    if owner is None or owner[1] != platform.node():
        return False
    try:
        os.kill(owner[0], SAVE_AND_END)
    except OSError:
        return False
    return True
