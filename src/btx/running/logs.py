"""`btx logs`: what jobs have printed, and print as long as they are under way."""

from __future__ import annotations

import time
from pathlib import Path

from btx.errors import UserError
from btx.process import Log
from btx.run_folder.folder import RunFolder
from btx.run_folder.jobs import jobs_of, log_of
from btx.run_folder.status import at_work
from btx.running.log_tail import LogTail, last_lines
from btx.running.under_way import standings_of

LOOK_S = 0.5
ASK_EVERY_S = 5.0
"""Seconds between two questions whether anything is still under way."""


def show_logs(run: RunFolder, stage: str | None, lines: int, *, follow: bool, say: Log) -> None:
    """Print the last lines of the logs of a run's jobs.

    Args:
        stage: only of the job that does this stage; None: of all.
        lines: how many of each.
        follow: print what comes, across requeues and new attempts, until nothing is under way any more.
        say: prints a line.

    Raises:
        UserError: no such stage, or nothing that it has printed.
    """
    logs = _logs(run, stage)
    if not any(log.is_file() for log in logs.values()) and not (follow and _under_way(run, stage)):
        what = f"{stage} has" if stage is not None else "its jobs have"
        raise UserError(f"{run.path}: {what} no log: none was started by `btx run` yet")
    talker = _Talker(say, names=len(logs) > 1)
    tails = {}
    for name, log in logs.items():
        tails[name] = LogTail.from_now(log)
        talker.say(name, last_lines(log, lines))
    asked = time.monotonic()
    while follow:
        time.sleep(LOOK_S)
        goes_on = True
        if time.monotonic() - asked > ASK_EVERY_S:
            goes_on, asked = _under_way(run, stage), time.monotonic()
        for name, tail in tails.items():
            talker.say(name, tail.new_lines())
        if not goes_on:
            return


class _Talker:
    """Prints lines of several logs, and says which log when it is another one, as `tail` does."""

    def __init__(self, say: Log, *, names: bool) -> None:
        self._say = say
        self._names = names
        self._last: str | None = None

    def say(self, name: str, lines: list[str]) -> None:
        if lines and self._names and name != self._last:
            self._say(f"{'' if self._last is None else chr(10)}==> {name} <==")
            self._last = name
        for line in lines:
            self._say(line)


def _logs(run: RunFolder, stage: str | None) -> dict[str, Path]:
    """Job → its log, of the jobs that do a stage, or of all."""
    jobs = {job.name: job.stages for job in jobs_of(run)}
    jobs |= {job[0].name: tuple(stage.name for stage in job) for job in run.graph.jobs() if job[0].name not in jobs}
    if stage is not None:
        wanted = {each.name for each in run.graph.named([stage], where=str(run.path))}
        jobs = {name: stages for name, stages in jobs.items() if wanted & set(stages)}
    return {name: log_of(run.path, name) for name in jobs}


def _under_way(run: RunFolder, stage: str | None) -> bool:
    """Whether more may come: `btx run` is there and the stage not done, or a job waits or works."""
    wanted = run.graph.named([stage], where=str(run.path)) if stage is not None else list(run.graph)
    if all(run.state(each) == "done" for each in wanted):
        return False
    works = [each.name for each in wanted]
    jobs, problems = standings_of(run)
    if problems or any(standing.state != "ended" and set(works) & set(job.stages) for job, standing in jobs):
        return True
    return any(at_work(run.path, work) is not None for work in ("run", *works))
