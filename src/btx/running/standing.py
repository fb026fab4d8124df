"""`btx status` with what the queues of clusters know: which stages wait there, and on which machines the others are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from btx.errors import SystemFailed, UserError
from btx.run_folder.folder import RunFolder
from btx.run_folder.jobs import Job, jobs_of
from btx.running.launchers import Standing
from btx.running.under_way import UnderWay


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
