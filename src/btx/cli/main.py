"""The command line. Stages are imported by the command that needs them, so that `btx --help` is instant."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_command

from btx.cli import completing_names
from btx.cli import init as cli_init
from btx.cli import jobs as cli_jobs
from btx.cli import launch as cli_launch
from btx.cli import measuring as cli_measuring
from btx.cli import mix as cli_mix
from btx.cli import out as cli_out
from btx.cli import plan as cli_plan
from btx.cli import serve as cli_serve
from btx.cli import sweep as cli_sweep
from btx.cli import watch as cli_watch
from btx.cli.arguments import with_arguments_read
from btx.cli.plan import AsJson, Overrides, RecipeArgument, resolved_recipe
from btx.cli.run_folders import RunArgument, open_run, show_results, train_here, work_on
from btx.cli.terminal import end, prepare_streams, remark, show, show_json
from btx.errors import NOT_YET, NotYet, UserError
from btx.process import READER_GONE, Interrupted, rank, wait_for_threads_briefly
from btx.system_errors import told

if TYPE_CHECKING:
    from btx.run_folder.folder import RunFolder

app = typer.Typer(
    name="btx", no_args_is_help=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Branch-Train-MiX: branch a language model, train domain experts apart, mix them into one MoE model.",
)  # fmt: skip


def main() -> None:
    """Run the command line; errors become one message and exit code 1, or 2 for the user's mistake."""
    prepare_streams()
    wait_for_threads_briefly()
    try:
        _commands()(prog_name="btx")  # also when it was started with python -m btx
    except KeyboardInterrupt:
        end(130)
    except BrokenPipeError:
        end(1)
    except SystemExit as ended:
        end(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    except Exception as error:
        if (message := told(error)) is None:
            raise
        # Of processes that train one model all stop together, and the first says so.
        is_said = message.exit_code == READER_GONE or (isinstance(message, Interrupted) and rank() > 0)
        text = "" if is_said else f"error: {message}"
        end(message.exit_code, text, try_output=isinstance(error, OSError) and error.filename is None)


@cache
def _commands() -> Any:
    """All commands, built once in a process."""
    return get_command(app)


def _print_version(asked: bool) -> None:
    if asked:
        from btx import __version__

        typer.echo(f"btx {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version and end.")] = False,
) -> None:  # fmt: skip
    """Options of btx itself."""


def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(
        help="Stop after this stage: seed, train, mix, finetune, ...", autocompletion=completing_names.stages)] = None,
    without: Annotated[list[str] | None, typer.Option(
        help="Leave this branch out of the mix, because it failed for example; repeat.",
        autocompletion=completing_names.domains)] = None,
    verify: Annotated[bool, typer.Option(
        "--verify", help="First read every file of finished stages whole: is it as it was written?")] = False,
) -> None:  # fmt: skip
    """Everything, from nothing to a report. Run it again and it continues."""
    from btx.running.pipeline import run as run_recipe

    finished = run_recipe(resolved_recipe(recipe, overrides), until=until, without=without or (), verify=verify)
    show_results(finished)


def status(
    run_folder: RunArgument,
    verify: Annotated[bool, typer.Option(
        "--verify", help="Read every file of finished stages whole: is it as it was written?")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """One line per stage: state, step, loss, tokens/s, ETA; of a sweep's folder one line per run."""
    from btx.cli.tables import sweep_status_table
    from btx.run_folder.status import run_status
    from btx.running.under_way import add_standings

    if (run_folder / "sweep.json").is_file():
        runs = cli_sweep.sweep_status(run_folder)
        show_json(runs) if as_json else show(sweep_status_table(runs))
        rows = [row for run in runs if verify and run["stages"]
                for row in run_status(open_run(Path(run["folder"])), verify=True)]  # fmt: skip
    else:
        run = open_run(run_folder)
        rows = run_status(run, verify=verify)
        problems = add_standings(run, rows)
        show_json(rows) if as_json else _print_status(run, rows)
        for problem in problems:
            remark(f"warning: {problem}")
    if verify and (damaged := [row["why"] for row in rows if row["state"] == "damaged"]):
        raise UserError("\n".join(damaged))
    if verify:
        finished = sum(row["state"] == "done" for row in rows)
        remark(f"verified: every file of the {finished} finished stages is as it was written")


def _print_status(run: RunFolder, rows: list[dict[str, Any]]) -> None:
    from btx.cli.tables import status_table, work_text

    stays = [row["stage"] for row in rows if row["state"] == "done"]
    to_do = [row["stage"] for row in rows if row["state"] == "damaged"
             or (row["stage"] not in stays and run.is_needed(run.graph[row["stage"]]))]  # fmt: skip
    show(status_table(rows), work_text(to_do, stays))


def ls(
    what: Annotated[str, typer.Argument(
        help="recipes, domains, routers, merges, baselines, families, launchers or trackers.",
        autocompletion=completing_names.kinds)] = "recipes",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """What there is to choose from."""
    from btx.cli.catalogue import CATALOGUE

    if what not in CATALOGUE:
        raise UserError(f"btx ls: {what!r} is nothing to list; there are: {', '.join(CATALOGUE)}")
    if as_json:
        show_json(CATALOGUE[what]())
        return
    from btx.cli.tables import families_table, pairs_table

    show(families_table() if what == "families" else pairs_table(what, CATALOGUE[what]()))


def cp(recipe: Annotated[str, typer.Argument(autocompletion=completing_names.packaged)], target: Path) -> None:
    """Copy a packaged recipe to edit it: btx cp demo my.yaml."""
    from btx.recipe.loading import copy_recipe

    copied = copy_recipe(recipe, target)
    typer.echo(f"copied {recipe}; edit it, then: btx plan {copied}")


def prepare(run_folder: RunArgument) -> None:
    """Make the token files of a run."""
    work_on(run_folder, ["data"])


def train(
    run_folder: RunArgument,
    domain: Annotated[str, typer.Argument(
        help="A domain of the recipe, or `seed` for the seed model.", autocompletion=completing_names.domains)],
) -> None:  # fmt: skip
    """Train one expert alone, on any machine that sees the run folder or a copy of what the expert needs of it.

    What it needs and is not there, data and seed model, is made first.
    """
    run = open_run(run_folder)
    (stage,) = run.graph.named(["seed" if domain == "seed" else f"train/{domain}"], where=str(run_folder))
    needs = [] if run.state(stage) == "done" else run.unfinished_needs(stage)
    for needed in needs if rank() == 0 else ():
        typer.echo(f"· {needed.name}: not there, made first")
    train_here(run_folder, [needed.name for needed in (*needs, stage)])


def adopt(
    run_folder: RunArgument,
    domain: Annotated[str, typer.Argument(help="A branch of the recipe.", autocompletion=completing_names.domains)],
    model: Annotated[Path, typer.Argument(
        help="Folder of its expert model, or of a LoRA adapter, trained by whatever you like.")],
) -> None:  # fmt: skip
    """Take an expert model that was trained elsewhere for a branch's; it is checked, copied and never trained here."""
    from btx.python.commands import adopt as adopt_model

    adopt_model(run_folder, domain, model, log=typer.echo)


def finetune(run_folder: RunArgument) -> None:
    """Finetune the mixed model of a run."""
    train_here(run_folder, ["finetune"])


def align(run_folder: RunArgument) -> None:
    """Train the finetuned model of a run on conversations, then on preferences: what its recipe has under `align`."""
    if not open_run(run_folder).graph.aligned:
        raise UserError(f"{run_folder}: the recipe has no `align`; it says what to train on (docs/after.md)")
    train_here(run_folder, ["align"])


def baselines(
    run_folder: RunArgument,
    names: Annotated[list[str] | None, typer.Argument(
        help="Baselines of the recipe; default: all of them.", autocompletion=completing_names.run_baselines)] = None,
) -> None:  # fmt: skip
    """Make the baselines of a run, or some of them."""
    stages = [stage.name for stage in open_run(run_folder).graph.baseline_stages(names)]
    train_here(run_folder, stages)


def work(run_folder: Path, stages: list[str]) -> None:
    """What a launcher starts: some stages of a run, in this process, ending with its parent. Exit code 75: not yet."""
    from btx.process import end_with_parent

    end_with_parent()
    try:
        work_on(run_folder, stages)
    except NotYet as error:
        end(NOT_YET, f"not yet: {error}")


PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Run": (cli_init.init, cp, ls, cli_plan.plan, run, cli_sweep.sweep, cli_launch.launch, cli_jobs.cancel),
    "Steps": (prepare, train, adopt, finetune, align, baselines),
    "Mix anybody's models": (cli_mix.mix, cli_mix.extend, cli_mix.drop),
    "Look": (status, cli_watch.watch, cli_jobs.logs, cli_measuring.evaluate, cli_measuring.analyze,
             cli_measuring.compare, cli_measuring.report),
    "Talk": (cli_serve.chat, cli_serve.serve),
    "Share": (cli_out.export, cli_out.push),
}  # fmt: skip
"""The commands as `btx --help` groups and orders them."""
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(with_arguments_read(command))
for started_by_btx in (work, cli_sweep.run_of_sweep, cli_launch.begin):
    app.command(hidden=True)(with_arguments_read(started_by_btx))
