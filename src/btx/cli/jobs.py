"""The commands for jobs that are under way: cancel, logs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from btx.cli.run_folders import RunArgument, open_run


def cancel(
    run_folder: Annotated[Path, typer.Argument(help="Run folder, or a sweep's.")],
    stages: Annotated[list[str] | None, typer.Argument(help="Stages whose jobs are ended; default: all.")] = None,
) -> None:
    """Let jobs that are under way save and end, on any launcher; the next `btx run` goes on with them."""
    from btx.running.cancelling import cancel as cancel_jobs
    from btx.running.cancelling import cancel_sweep

    if (run_folder / "sweep.json").is_file():
        from btx.sweeps.sweep import runs_in

        cancel_sweep(run_folder, [folder for _, _, folder in runs_in(run_folder)], typer.echo)
        return
    run = open_run(run_folder)
    names = [stage.name for stage in run.graph.named(stages or (), where=str(run_folder))]
    cancel_jobs(run, names, typer.echo)


def logs(
    run_folder: RunArgument,
    stage: Annotated[str | None, typer.Argument(help="A stage, whose job's log is shown; default: all logs.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until nothing is under way any more.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines of each log.")] = 20,
) -> None:
    """The last lines that jobs have printed."""
    from btx.running.logs import show_logs

    show_logs(open_run(run_folder), stage, lines, follow=follow, say=partial(print, flush=True))
