"""`btx watch`: look again and again until the run has ended. Plain Python.

Only files are read, so it works on any machine that sees the folder, and its end ends nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from btx.errors import BtxError, NotYet, RunFolderError, StageFailed, UserError
from btx.reporting.report import write_report
from btx.reporting.run_files import MEASURING
from btx.run_folder.folder import RunFolder, exclusive
from btx.running.looks import Look, Watched, WatchedRun
from btx.running.watch_screens import Screen
from btx.system_errors import first_line

PATIENCE_S = 60.0
"""Seconds a run folder may take to appear, or to come back: network file systems show late what others write."""
QUIET_S = 5.0
"""Seconds without anybody at work after which a run that is not finished counts as stopped."""
APPEARS_S = 0.2
"""Seconds between two questions whether it is there."""
REPORT_EVERY_S = 30.0
"""Seconds between two reports, at least; ten times what one takes if that is longer."""


def watch(find: Callable[[], Watched | None], path: Path, screen: Screen, *, html: bool = False) -> None:
    """Show how a run or sweep stands until it has ended, or nobody is at work on it any more.

    Args:
        find: what there is to look at in `path`; None while nothing is there.
        html: write the run's report anew while it trains.

    Raises:
        StageFailed: nobody is at work any more, and something has failed.
        RunFolderError: nothing appears in `path`, or what was there is gone, for `PATIENCE_S` seconds.
        UserError: it is no run, or its files are not as btx writes them; `html` of a sweep.
    """
    with screen:
        watched = _appearing(find, path, screen)
        if html and not isinstance(watched, WatchedRun):
            raise UserError(f"{path}: --html is for one run; a sweep's runs have reports of their own")
        report = Report(path) if html else None
        last = _look_on(watched, screen, report)
        if report is not None and (remark := report.write()):
            screen.say(remark)
    if last.failed and not last.is_done:
        raise StageFailed(f"{path}: failed, and nobody is at work on it: {'; '.join(last.failed)}")


def _appearing(find: Callable[[], Watched | None], path: Path, screen: Screen) -> Watched:
    if (watched := find()) is not None:
        return watched
    screen.say(f"{path}: not there yet; waiting {PATIENCE_S:.0f} s for a run to begin")
    since = time.monotonic()
    while time.monotonic() - since < PATIENCE_S:
        time.sleep(APPEARS_S)
        if (watched := find()) is not None:
            return watched
    raise RunFolderError(f"{path}: no run has begun here; `btx run RECIPE run={path}` begins one")


def _look_on(watched: Watched, screen: Screen, report: Report | None) -> Look:
    """Look until there is nothing more to see; returns the last look."""
    look: Look | None = None
    quiet = failing = 0.0
    """Since when, by this process's clock; 0: not now."""
    while True:
        remarks = []
        try:
            look, failing = watched.look(), 0.0
        except (BtxError, OSError) as error:
            failing = failing or time.monotonic()
            if look is None or time.monotonic() - failing > PATIENCE_S:
                raise
            remarks.append(f"cannot be read at the moment: {first_line(error)}")
        if report is not None and not failing and (remark := report.write_in_time()):
            remarks.append(remark)
        screen.show(look, remarks)
        if look.is_done and not failing:
            screen.say(f"{watched.path}: finished")
            return look
        quiet = 0.0 if look.is_under_way or failing else quiet or time.monotonic()
        if quiet and time.monotonic() - quiet >= QUIET_S:
            screen.say(f"{watched.path}: nobody is at work on it")
            return look
        screen.wait(QUIET_S if quiet else None)


class Report:
    """A run's page, written beside and renamed as `btx report` does it, and never while the run writes it itself."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.due = 0.0

    def write_in_time(self) -> str:
        """Write it if the last one is old enough; returns what went wrong, for this time."""
        return self.write() if time.monotonic() >= self.due else ""

    def write(self) -> str:
        """Write it; returns what went wrong."""
        began, problem = time.monotonic(), ""
        try:
            with exclusive(self.run, "report"):
                write_report(self.run, stale=RunFolder.open(self.run).stale(*MEASURING))
        except NotYet:
            pass
        except (BtxError, OSError) as error:
            problem = f"the report was not written this time: {first_line(error)}"
        ended = time.monotonic()
        self.due = ended + max(REPORT_EVERY_S, 10 * (ended - began))
        return problem
