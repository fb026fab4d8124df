"""The jobs of a run that are under way, on whatever launcher: submitted, found again by a new `btx run`, asked how they
stand, and let go; and what `btx status` says of them. Plain Python.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from btx.errors import RunFolderError, SystemFailed, UserError
from btx.files import value_hash
from btx.run_folder import lease
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.run_folder.jobs import JOBS, Job, forget, job_of, jobs_of, log_of, note
from btx.run_folder.manifest import now
from btx.running.launchers import START, Launcher, Standing
from btx.running.log_tail import LogTail

DECIDES_NOTHING = {"name", "description", "run", "launch", "sweep"}
"""Sections of a recipe that may change while jobs are under way."""
ENDING_S = 0.1


class Silence:
    """How long the process of a job has given no sign of life, by this process's own clock: stopped as a whole, or on a
    machine that is gone. A job whose work hangs while it runs ends itself (`btx.process.ending_if_hung`).

    Args:
        run: the run folder.
        stages: those of the job. One that waits, or is between two stages, is not silent.
    """

    def __init__(self, run: Path, stages: Sequence[str]) -> None:
        self._leases = [lease.lock_file(run, stage, "lease") for stage in stages]
        self._seen: list[object] = []
        self._silent_s, self._before = 0.0, time.monotonic()

    def exceeds(self, limit_s: float) -> bool:
        """Whether it has lasted for `limit_s` seconds, and so long that it is no chance. Counted while this is asked: a
        pause of this process itself is none of the job's."""
        signs, moment = [lease.sign_of_life(file) for file in self._leases], time.monotonic()
        silent = signs == self._seen and any(sign is not None for sign in signs)
        self._silent_s = (self._silent_s + min(moment - self._before, lease.BEAT_S)) * silent
        self._seen, self._before = list(signs), moment
        return self._silent_s > max(limit_s, lease.LEASE_S)


@dataclass
class Running:
    """A job under way, in a queue or at work."""

    stages: tuple[Stage, ...]
    job: Job
    tail: LogTail
    is_ours: bool
    """Whether this process has submitted it, and not one before."""
    silence: Silence
    has_begun: bool = False
    node: str | None = None
    """Where it runs, as its launcher has said last."""
    hung: bool = False
    """Ended because it gave no sign of life."""
    lines: list[str] = field(default_factory=list)
    """What has come into its log, but for what it told the user."""
    finished: set[str] = field(default_factory=set)
    ended: float | None = None
    """When its end was first seen, by this process's clock."""

    @property
    def name(self) -> str:
        """That of its first stage."""
        return self.job.name

    @property
    def first_left(self) -> str:
        """Its first stage that was not finished before."""
        return next((stage.name for stage in self.stages if stage.name not in self.finished), self.name)

    def makes(self, stages: Collection[str]) -> bool:
        """Whether it does one of these stages."""
        return any(stage.name in stages for stage in self.stages)


class UnderWay:
    """All of one run folder, for the process that holds it, or for one that only looks."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.running: list[Running] = []
        self._launchers: dict[str, Launcher] = {}
        self._recipe = value_hash(run.recipe.model_dump(mode="json", exclude=DECIDES_NOTHING))
        """By what it is known whether jobs were submitted for this recipe."""
        self._attempts: dict[str, int] = {}

    @property
    def launcher(self) -> Launcher:
        """The recipe's, which takes new jobs."""
        return self.launcher_of(self.run.recipe.launch.kind)

    def launcher_of(self, kind: str) -> Launcher:
        """The launcher of a job that is under way."""
        if kind not in START:
            raise RunFolderError(f"{self.run.path / JOBS}: submitted by {kind!r}, which this version does not know")
        if kind not in self._launchers:
            self._launchers[kind] = START[kind](self.run.recipe.launch, self.run.recipe.device)
        return self._launchers[kind]

    def find(self) -> list[Running]:
        """The jobs that an earlier `btx run` has submitted and that have not ended.

        Raises:
            UserError: they do something else than what this run asks for; or their engine is not here.
            SystemFailed: their engine does not answer.
        """
        jobs = jobs_of(self.run)
        living = [job for job, standing in zip(jobs, self.poll(jobs), strict=True) if standing.state != "ended"]
        names = {stage.name for stage in self.run.graph}
        other = [job.name for job in living if self.launcher_of(job.launcher).goes_on
                 and (job.recipe != self._recipe or not names.issuperset(job.stages))]  # fmt: skip
        if other:
            path = self.run.path
            raise UserError(f"{path}: {', '.join(other)}: submitted with another recipe and not ended yet; `btx cancel "
                            f"{path}` lets them save and end")  # fmt: skip
        for job in jobs:
            if job not in living:
                forget(self.run.path, job)
        self.running = [
            Running(tuple(self.run.graph[name] for name in job.stages if name in names), job,
                    LogTail.from_now(log_of(self.run.path, job.name)), False, Silence(self.run.path, job.stages))
            for job in living
        ]  # fmt: skip
        return self.running

    def submit(self, stages: Sequence[Stage], needed: Sequence[Running]) -> Running:
        """Submit a job, to begin when those that it needs have ended well; raises as `Launcher.submit`."""
        path, names = self.run.path, tuple(stage.name for stage in stages)
        log = log_of(path, names[0])
        tail = LogTail.from_now(log)
        after = [running.job.handle for running in needed] if self.launcher.takes_waiting else []
        handle = self.launcher.submit(path, names, log, after=after)
        attempt = self._attempts[names[0]] = self._attempts.get(names[0], 0) + 1
        job = Job(names, self.run.recipe.launch.kind, handle, self._recipe, now(), attempt)
        running = Running(tuple(stages), job, tail, True, Silence(path, names))
        self.running.append(running)
        note(path, job)
        return running

    def poll(self, jobs: Sequence[Job]) -> list[Standing]:
        """How jobs stand, each launcher asked once; raises as `Launcher.poll`."""
        standings: dict[int, Standing] = {}
        for kind in {job.launcher: None for job in jobs}:
            alike = [job for job in jobs if job.launcher == kind]
            polled = self.launcher_of(kind).poll([job.handle for job in alike])
            standings |= {id(job): standing for job, standing in zip(alike, polled, strict=True)}
        return [standings[id(job)] for job in jobs]

    def let_go(self, running: Running) -> Job:
        """A job has ended; returns what its file said at last."""
        last = job_of(self.run.path, running.name) or running.job
        forget(self.run.path, running.job)
        self.running.remove(running)
        return last

    def cancel(self, running: Sequence[Running]) -> None:
        """Ask jobs to save and end."""
        for each in running:
            self.launcher_of(each.job.launcher).cancel(each.job.handle)

    def kill(self, running: Running) -> None:
        """End a job that answers nothing any more."""
        self.launcher_of(running.job.launcher).kill(running.job.handle)

    def end(self) -> list[str]:
        """Ask every job that ends with this process to save and end, and wait for it; names of those that go on and
        are meant to."""
        ending = [running for running in self.running if not self.launcher_of(running.job.launcher).goes_on]
        self.cancel(ending)
        while ending:
            time.sleep(ENDING_S)
            standings = self.poll([running.job for running in ending])
            for running, standing in zip(list(ending), standings, strict=True):
                if standing.state == "ended":
                    ending.remove(running)
                    self.let_go(running)
        files = [job_of(self.run.path, running.name) for running in self.running]
        return [job.name for job in files if job is not None and not job.cancelled]


def job_text(job: Job) -> str:
    """A job as its engine knows it: `slurm, job 12`."""
    return ", ".join([job.launcher, *(f"{key} {value}" for key, value in job.handle.items())])


def add_standings(run: RunFolder, rows: list[dict[str, Any]]) -> list[str]:
    """Add to the status of a run's stages how their jobs stand, with the state `queued` too; returns what could not be
    found out.

    Programs of a cluster are asked only if jobs of this run are there.

    Args:
        rows: `StageStatus` as dictionaries, changed in place.
    """
    standings, problems = standings_of(run)
    add_known(rows, standings)
    return problems


def add_known(rows: list[dict[str, Any]], standings: Sequence[tuple[Job, Standing]]) -> None:
    """Add what `standings_of` has found out: of a job's stages that they wait, or of the first that is not done where
    it runs."""
    for job, standing in standings:
        left = [row for row in rows if row["stage"] in job.stages and row["state"] not in ("done", "damaged")]
        for place, row in enumerate(left if standing.state != "ended" else ()):
            runs = standing.state == "running" and place == 0
            lost = row["why"] if row["state"] == "begun" else None  # what ran before it was put back into the queue
            row["state"] = "running" if runs else "queued"
            row["node"] = standing.node or row["node"] if runs else None
            row["why"] = None if runs else "; ".join(filter(None, (standing.why, lost))) or None
            row["eta_s"] = row["eta_s"] if runs else None


def standings_of(run: RunFolder) -> tuple[list[tuple[Job, Standing]], list[str]]:
    """How the jobs stand that go on without `btx run`, each launcher asked once, and which do not answer. What runs on
    this machine, or has a `btx run` elsewhere, says itself that it is at work."""
    standings: list[tuple[Job, Standing]] = []
    problems = []
    jobs, under_way = jobs_of(run), UnderWay(run)
    for kind in {job.launcher: None for job in jobs}:
        alike = [job for job in jobs if job.launcher == kind]
        try:
            if under_way.launcher_of(kind).goes_on:
                standings += zip(alike, under_way.poll(alike), strict=True)
        except (SystemFailed, UserError) as error:
            names = ", ".join(job.name for job in alike)
            problems.append(f"{names}: what {kind} knows of these jobs cannot be asked here: {error}")
    return standings, problems
