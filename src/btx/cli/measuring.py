"""The commands that measure and show: evaluate, analyze, compare, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from btx.cli.plan import AsJson
from btx.cli.run_folders import RunArgument, open_run, show_results, work_on
from btx.cli.terminal import show, show_json
from btx.errors import UserError
from btx.outputs import read_output


def evaluate(
    run_folder: Annotated[Path, typer.Argument(help="Run folder; with --task also any model folder or hub name.")],
    task: Annotated[str | None, typer.Option(
        help="Measure one task of lm-evaluation-harness only, and write nothing: gsm8k, arc_easy, mmlu, ...")] = None,
    file: Annotated[Path | None, typer.Option(help="Its JSONL file; without it lm-eval asks the hub.")] = None,
    shots_file: Annotated[Path | None, typer.Option(help="JSONL file of shots; default: the start of FILE.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Solved examples shown; default: the paper's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents scored at most.")] = None,
    allow_code_execution: Annotated[bool, typer.Option(
        "--allow-code-execution", help="Let programs that the model writes run, fenced in: humaneval, mbpp.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure every model of a run on held-out text and tasks, or any model on one task."""
    if task is not None:
        from btx.evaluation.harness_files import TaskRequest
        from btx.stages.one_task import evaluate_task

        request = TaskRequest(task, task, file, shots_file, shots, limit)
        found = evaluate_task(run_folder, request, allow_code_execution=allow_code_execution,
                              log=lambda line: None if as_json else typer.echo(line))  # fmt: skip
        if as_json:
            show_json(found)
        return
    if any((file, shots_file, shots is not None, limit, allow_code_execution)):
        raise UserError("btx evaluate: --file, --shots, --limit and the like go with --task NAME")
    if (run_folder / "config.json").is_file():
        raise UserError(f"{run_folder} is a model, not a run; say what to measure it on: --task NAME --file FILE")
    work_on(run_folder, ["evaluate"], quiet=as_json)
    if as_json:
        show_json(read_output(run_folder / "evaluate" / "results.json"))
    else:
        show_results(open_run(run_folder))


def analyze(run_folder: RunArgument, as_json: AsJson = False) -> None:
    """Find out which expert each token of a run's model uses."""
    work_on(run_folder, ["analyze"], quiet=as_json)
    if as_json:
        show_json(read_output(run_folder / "analyze" / "routing.json"))


def compare(
    run_folder: RunArgument,
    model_a: Annotated[str, typer.Argument(help="Name of a model in the results.")] = "btx",
    model_b: Annotated[str | None, typer.Argument(help="What it is compared with; default: every other.")] = None,
    other_run: Annotated[
        Path | None,
        typer.Option(
            "--with",
            help="Run folder whose models it is compared with, another variant of a sweep for example.",
        ),
    ] = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples.")] = 2000,
    rng_seed: Annotated[int, typer.Option(help="Random number seed of the resampling.")] = 0,
    as_json: AsJson = False,
) -> None:
    """How sure the differences between models are: paired bootstrap over documents and questions."""
    from btx.evaluation.compare import compare_models

    others = None if other_run is None else open_run(other_run).path
    found = compare_models(
        open_run(run_folder).path, model_a, model_b, other_run=others, resamples=resamples, rng_seed=rng_seed
    )
    if as_json:
        show_json(found)
    else:
        from btx.cli.tables import comparison_table

        show(comparison_table(found))


def report(
    run_folder: RunArgument,
    beside: Annotated[Path | None, typer.Option(
        "--with", help="Another run, or an analysed model's folder: its tokens beside those of the same text.")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write the run's report, whatever stage it has reached."""
    from btx.reporting.report import write_report
    from btx.run_folder.folder import exclusive

    run = open_run(run_folder)
    with exclusive(run.path, "report", patience_s=60.0):
        path = write_report(run.path, beside=beside)
    show_json({"report": str(path)}) if as_json else typer.echo(path)
