"""What a person sees while a run works: bars on a terminal, timestamped lines elsewhere. Plain Python."""

from __future__ import annotations

import time
from datetime import datetime

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from btx.number_texts import clock_text
from btx.run_folder.status import StageStatus

LINE_EVERY_S = 10.0


class Display:
    """Shows jobs and messages; a context manager, so that the terminal is always left in order."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.live = self.console.is_terminal
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(), console=self.console, disable=not self.live,
        )  # fmt: skip

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def say(self, message: str) -> None:
        """A line that stays."""
        if self.live:
            self._progress.console.print(Text(message))
        else:
            print(f"{datetime.now():%H:%M:%S} {message}", flush=True)

    def update(self, status: StageStatus) -> None:
        """Show how far a training job is."""
        if status.step is None or not status.steps:
            return
        if self.live:
            task = self._tasks.get(status.stage)
            if task is None:
                task = self._tasks[status.stage] = self._progress.add_task(status.stage, total=status.steps, facts="")
            self._progress.update(task, completed=status.step, total=status.steps, facts=_facts(status))
        elif time.monotonic() - self._last_line.get(status.stage, 0.0) >= LINE_EVERY_S:
            self._last_line[status.stage] = time.monotonic()
            self.say(f"{status.stage}: step {status.step}/{status.steps}, {_facts(status)}")

    def begin(self, stage: str) -> None:
        """Show that a stage has started."""
        if self.live and stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=None, facts="")
        elif not self.live:
            self.say(f"{stage}: started")

    def finish(self, stage: str, status: StageStatus) -> None:
        """Show that a stage is done."""
        loss = f", loss {status.loss:.3f}" if status.loss is not None else ""
        if self.live and stage in self._tasks:
            total = status.steps or 1
            self._progress.update(self._tasks[stage], completed=total, total=total, facts=f"done{loss}")
            self._progress.stop_task(self._tasks[stage])
        elif not self.live:
            self.say(f"{stage}: done{loss}" + (f" in {status.wall_s:.0f} s" if status.wall_s else ""))


def _facts(status: StageStatus) -> str:
    eta = clock_text(status.eta_s) if status.eta_s is not None else "?"
    loss = f"loss {status.loss:.3f}" if status.loss is not None else "no loss"  # of a step that was left out
    return f"{loss}, {status.tokens_per_s:,.0f} tokens/s, ETA {eta}"
