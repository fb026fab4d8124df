"""What a launcher is: it starts `btx work RUN STAGE...` somewhere; the run folder's files say how it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Handle = Mapping[str, Any]
"""By what a launcher knows a job again, in another process and on another machine too: a JSON value that the run folder
keeps."""


class Launcher(Protocol):
    """One way to start jobs, with the settings of one recipe."""

    @property
    def takes_waiting(self) -> bool:
        """Whether jobs can be handed over before those they need have ended; else the pipeline holds them back."""

    def submit(self, run: Path, stages: Sequence[str], log: Path, *, after: Sequence[Handle] = ()) -> Handle:
        """Have `stages` of the run folder done in one job; its output goes to `log`, behind what is there.

        Args:
            after: jobs that have to end well before this one starts; only where `takes_waiting`.

        Raises:
            UserError: the engine is not here, or refuses what the recipe asks of it.
        """

    def poll(self, handle: Handle) -> int | None:
        """Exit code of a job; negative: the signal that ended it. None while it waits or runs."""

    def cancel(self, handle: Handle) -> None:
        """Ask a job to save and end; one that has not begun will not. Returns at once."""

    def kill(self, handle: Handle) -> None:
        """End a job that answers nothing any more, with all its processes. Returns at once."""
