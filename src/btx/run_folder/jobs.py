"""The jobs of a run that are submitted: `jobs/NAME.json` for each, until `btx run` has seen its end.

So a new `btx run`, `btx status` or `btx cancel`, on another machine too, knows what is under way. Plain Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from btx.files import read_json, write_json
from btx.run_folder.folder import RunFolder

JOBS = "jobs"


class JobFile(TypedDict):
    """What such a file holds."""

    stages: list[str]
    launcher: str
    handle: dict[str, Any]
    recipe: str
    submitted: str
    attempt: int
    cancelled: bool


@dataclass(frozen=True)
class Job:
    """A job under way."""

    stages: tuple[str, ...]
    launcher: str
    """`launch.kind` by which it was submitted."""
    handle: Mapping[str, Any]
    """By what the launcher knows it."""
    recipe: str
    """Hash of what the recipe asked for."""
    submitted: str
    """When, in UTC."""
    attempt: int
    """How often one `btx run` has submitted it, this time included."""
    cancelled: bool = False
    """Whether the user has asked it to end."""

    @property
    def name(self) -> str:
        """That of its first stage."""
        return self.stages[0]


def log_of(run: Path, job: str) -> Path:
    """Where the output of a job goes."""
    return run / "logs" / f"{job.replace('/', '-')}.log"


def note(run: Path, job: Job) -> None:
    """Write a job's file."""
    write_json(_file(run, job.name), asdict(job))


def note_cancelled(run: Path, job: Job) -> None:
    """Note that the user has asked a job to end: its end is no failure, and it is not tried again."""
    if job_of(run, job.name) is not None:
        note(run, replace(job, cancelled=True))


def forget(run: Path, job: Job) -> None:
    """A job has ended, and how is known."""
    _file(run, job.name).unlink(missing_ok=True)


def jobs_of(run: RunFolder) -> list[Job]:
    """All jobs with a file, in an order in which they can run.

    Raises:
        RunFolderError: a file is not as btx writes it.
    """
    files = sorted((run.path / JOBS).glob("*.json"))
    places = {stage.name: place for place, stage in enumerate(run.graph)} if files else {}
    jobs = [job for file in files if (job := _read(file)) is not None]
    return sorted(jobs, key=lambda job: places.get(job.name, len(places)))


def job_of(run: Path, name: str) -> Job | None:
    """The job of this name; raises as `jobs_of`."""
    return _read(_file(run, name))


def _read(file: Path) -> Job | None:
    job = read_json(file, JobFile)
    return None if job is None else Job(**job | {"stages": tuple(job["stages"])})


def _file(run: Path, name: str) -> Path:
    return run / JOBS / f"{name.replace('/', '-')}.json"
