"""Report: one offline page."""

from __future__ import annotations

import time

from btx.process import Interrupts, Log
from btx.reporting.report import write_report
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage


def report_run(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Write the page."""
    run.begin(stage)
    started = time.perf_counter()
    path = write_report(run.path)
    run.finish(stage, tokens=0, flops=0.0, wall_s=time.perf_counter() - started)
    log(f"report: {path}")
