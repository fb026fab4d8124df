"""The command watch."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from btx.cli.plan import AsJson
from btx.cli.terminal import remark


def watch(
    run_folder: Annotated[Path, typer.Argument(help="Run folder, or a sweep's; it may still be to come.")],
    every: Annotated[float | None, typer.Option(
        min=0.1, max=3600.0, metavar="SECONDS",
        help="Between two looks; default: 1 on a terminal, 10 elsewhere.")] = None,
    html: Annotated[bool, typer.Option("--html", help="Write the run's report anew every half minute.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Watch all jobs of a run, on any launcher and from any machine, until it ends; Ctrl-C ends the watching alone.

    The exit code is 1 if the run has failed, else 0. On a terminal a view that is drawn anew; elsewhere, and with
    --json, a line for each change.
    """
    from rich.console import Console

    from btx.process import Interrupted, ending_at_once
    from btx.running.watch import watch as watch_run
    from btx.running.watch_screens import LineScreen, Screen, TerminalScreen
    from btx.sweeps.looks import watched_in

    console = Console(markup=False, emoji=False, highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal and not as_json
    screen: Screen = TerminalScreen(console, every) if live else LineScreen(every, as_json=as_json)
    try:
        with ending_at_once("stopped watching; nothing else was stopped"):
            watch_run(lambda: watched_in(run_folder), run_folder, screen, html=html)
    except Interrupted as stopped:
        if stopped.exit_code != 128 + signal.SIGINT:
            raise
        remark(str(stopped))  # Ctrl-C is how one leaves
