"""Report: one offline page."""

from __future__ import annotations

from btx.process import Interrupts, Log
from btx.reporting.report import write_report
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage


def report_run(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Write the page."""
    with run.making(stage, log) as facts:
        path = write_report(run.path, facts.folder)
    log(f"report: {run.folder(stage.name) / path.name}")
