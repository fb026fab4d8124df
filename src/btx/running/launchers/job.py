"""What a launcher is: it starts `btx work RUN STAGE...` somewhere; the run folder's files say how it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Job(Protocol):
    """A job that was started."""

    @property
    def log(self) -> Path:
        """File its output goes to."""

    @property
    def handle(self) -> Mapping[str, Any]:
        """By what the launcher knows it again, as a JSON value: goes into the run's events."""

    def exit_code(self) -> int | None:
        """None while it runs."""

    def terminate(self) -> None:
        """Ask it to save and end."""

    def wait(self) -> None:
        """Wait until it has ended."""


class StartStages(Protocol):
    """Starts stages of a run folder."""

    def __call__(self, run: Path, stages: Sequence[str], log: Path) -> Job:
        """Start `stages` of the run folder; output goes to `log`."""


class StartRun(Protocol):
    """Starts everything that is left of a run folder."""

    def __call__(self, run: Path, log: Path, *, threads: int | None = None) -> Job:
        """Start it, with so many CPU threads for stages that run alone (None: all); output goes to `log`."""


@dataclass(frozen=True)
class Launcher:
    """One way to start jobs."""

    start_stages: StartStages
    start_run: StartRun
