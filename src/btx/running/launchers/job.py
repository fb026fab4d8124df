"""What a launcher is: it starts `btx work RUN STAGE...` somewhere; the run folder's files say how it went."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from btx.errors import UserError
from btx.recipe.launch import Launch

Handle = Mapping[str, Any]
"""By what a launcher knows a job again, in another process and on another machine too: a JSON value that the run folder
keeps."""

VARIABLES = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "TOKENIZERS_PARALLELISM": "true"}
"""Environment of every job."""
SAVED = 128 + signal.SIGTERM
"""Exit code of a job that was asked to end, and has saved."""


def btx_command() -> list[str]:
    """What starts btx in a job. `-P`: a yaml.py or datasets.py that lies where btx is started is not imported."""
    return [sys.executable, "-P", "-m", "btx"]


@dataclass(frozen=True)
class Standing:
    """How a job stands, as its launcher knows it."""

    state: Literal["queued", "running", "ended"]
    exit_code: int | None = None
    """Of a job that has ended; negative: the signal that ended it. None: the launcher knows no more of it, and the run
    folder alone says how it went."""
    node: str | None = None
    """The machine or machines that a job is on, or was on when it ended, as the engine calls them; None: this one, or
    the engine does not say."""
    why: str = ""
    """In the engine's words, why a job waits or what ended it."""


class Launcher(Protocol):
    """One way to start jobs, with the settings of one recipe."""

    @property
    def takes_waiting(self) -> bool:
        """Whether jobs can be handed over before those they need have ended; else the pipeline holds them back."""

    @property
    def goes_on(self) -> bool:
        """Whether jobs go on when the process that submitted them ends; else that one ends them first."""

    def check(self, run: Path, jobs: Sequence[Sequence[str]]) -> None:
        """Refuse jobs (the stages of each) that cannot be submitted here, before anything is written.

        Raises:
            UserError: the engine is not here, or refuses what the recipe asks of it.
        """

    def submit(self, run: Path, stages: Sequence[str], log: Path, *, after: Sequence[Handle] = ()) -> Handle:
        """Have `stages` of the run folder done in one job; its output goes to `log`, behind what is there.

        Args:
            after: jobs that have to end well before this one starts; only where `takes_waiting`.

        Raises:
            UserError: as `check`.
            SystemFailed: the engine does not answer.
        """

    def poll(self, handles: Sequence[Handle]) -> list[Standing]:
        """How jobs stand, in this order.

        Raises:
            UserError: the engine is not here.
            SystemFailed: the engine does not answer; it may do so when it is asked again.
        """

    def cancel(self, handle: Handle) -> None:
        """Ask a job to save and end, for good; one that has not begun will not. Returns at once; raises as `poll`."""

    def kill(self, handle: Handle) -> None:
        """End a job that answers nothing any more, with all its processes. Returns at once; raises as `poll`."""


def refuse_several_nodes(launch: Launch, jobs: Sequence[Sequence[str]], why: str) -> None:
    """Raise UserError if models are to be trained on several machines by a launcher that gives each job one; `why` is
    for the message."""
    for stages in jobs:
        if (nodes := launch.nodes_of(stages[0])) > 1:
            raise UserError(
                f"launch.nodes: {nodes} for {stages[0]}: {why}, on which launch.processes train its model together; "
                f"launch.nodes=1, or launch.kind=slurm (`btx launch --for jobset` and `sky` also write text for more)"
            )
