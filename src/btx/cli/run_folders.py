"""What commands do with a run folder: open it, work on its stages, print its results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from btx.cli.terminal import show, silent
from btx.errors import StageFailed
from btx.outputs import read_output
from btx.process import rank, world_size

if TYPE_CHECKING:
    from btx.run_folder.folder import RunFolder

RunArgument = Annotated[Path, typer.Argument(help="Run folder, as `btx run` makes it.")]
LARGEST_SEED = 2**32 - 1
"""Random number seed, as in a recipe's `rng_seed`."""
ModelArgument = Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="Run folder or model folder; hf:ORG/NAME.")]


def work_on(run_folder: Path, stages: list[str], *, quiet: bool = False) -> None:
    """Work on some stages of a run in this process; what else they need has to be there."""
    from btx.process import Interrupts
    from btx.stages.work import run_stages

    interrupts = Interrupts().listen()
    try:
        run_stages(open_run(run_folder), stages, interrupts, silent if quiet else interrupts.tell)
    except RuntimeError as error:  # under a torchrun of the user's
        from btx.stages.processes import is_lost

        if world_size() == 1 or not is_lost(error):
            raise
        raise StageFailed(f"process {rank()} has lost another one of the {world_size()} that train a model") from None


def train_here(run_folder: Path, stages: list[str]) -> None:
    """Work on stages that train, and say at the end where their models are."""
    work_on(run_folder, stages)
    run = open_run(run_folder)
    for stage in run.graph.named(stages, where=str(run_folder)) if rank() == 0 else ():
        if stage.trains:
            typer.echo(f"· {stage.name}: done, {run.model(stage.name)}")


def is_run(path: Path) -> bool:
    """Whether a folder is a run's and no model's."""
    return (path / "recipe.yaml").is_file()


def open_run(path: Path) -> RunFolder:
    """The run in a folder; raises RunFolderError if there is none."""
    from btx.run_folder.folder import RunFolder

    return RunFolder.open(path)


def show_results(finished: RunFolder) -> None:
    """Print the table of results, as far as there are any, and where the report is."""
    from btx.reporting.shapes import Results

    if why := finished.stale("evaluate").get("evaluate"):
        typer.echo(
            f"· evaluate: stale ({why}), so its results are not shown; `btx run {finished.path}` makes them anew"
        )
    elif (results := read_output(finished.path / "evaluate" / "results.json", Results)) is not None:
        from btx.reporting.results import report_table

        show(report_table(results))
    page = finished.path / "report" / "index.html"
    if page.is_file():
        of_before = " (stale, of the results of before)" if finished.stale("report") else ""
        typer.echo(f"report: {page}{of_before}")
