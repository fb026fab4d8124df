"""The commands that measure and show: evaluate, analyze, compare, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from btx.cli import completing_names
from btx.cli.mix import named
from btx.cli.plan import AsJson
from btx.cli.run_folders import LARGEST_SEED, RunArgument, is_run, open_run, show_results, work_on
from btx.cli.terminal import remark, show, show_json, silent
from btx.errors import UserError
from btx.evaluation.analysis_request import EXAMPLES, TEXT_KEY, TOKENS, check_run_alone
from btx.model_files.hub import folder_or_name
from btx.outputs import read_output


def evaluate(
    run_and_models: Annotated[list[str], typer.Argument(
        metavar="RUN [NAME=MODEL]...", show_default=False,
        help="Run folder; with --task also any model folder or hub name.")],
    model: Annotated[list[str] | None, typer.Option(
        "--model", metavar="NAME=MODEL",
        help="Measure another model, a folder or hub name, and keep it beside the run's; several may follow.",
    )] = None,
    forget: Annotated[list[str] | None, typer.Option(
        metavar="NAME", help="Take another model out of the run's results; repeat.")] = None,
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
    """Measure every model of a run on held-out text and tasks, and others beside it; or any model on one task."""
    place, models = _place_and_pairs("evaluate", run_and_models, model or [], "--model", "MODEL")
    run_folder = Path(folder_or_name(place))
    if task is not None:
        from btx.evaluation.harness_files import TaskRequest
        from btx.stages.one_task import evaluate_task

        if models or forget:
            raise UserError("btx evaluate: --model and --forget go with a run's own text and tasks, not with --task")
        request = TaskRequest(task, task, file, shots_file, shots, limit)
        results = evaluate_task(run_folder, request, allow_code_execution=allow_code_execution,
                                log=silent if as_json else typer.echo)  # fmt: skip
        if as_json:
            show_json(results)
        return
    if any((file, shots_file, shots is not None, limit, allow_code_execution)):
        raise UserError("btx evaluate: --file, --shots, --limit and the like go with --task NAME")
    if (run_folder / "config.json").is_file():
        raise UserError(f"{run_folder} is a model, not a run; say what to measure it on: --task NAME --file FILE, or "
                        f"btx evaluate RUN --model NAME={run_folder}")  # fmt: skip
    if models or forget:
        _evaluate_beside(run_folder, models, forget or [], quiet=as_json)
    else:
        work_on(run_folder, ["evaluate"], quiet=as_json)
    if as_json:
        show_json(read_output(run_folder / "evaluate" / "results.json"))
    else:
        show_results(open_run(run_folder))


def _evaluate_beside(run_folder: Path, models: dict[str, Path], forget: list[str], *, quiet: bool) -> None:
    """Add models to those beside a run's, or take some away, and measure what is new."""
    from btx.process import Interrupts
    from btx.run_folder.other_models import check_other_models

    run, wanted = open_run(run_folder), {name: folder_or_name(str(path)) for name, path in models.items()}
    check_other_models(run.recipe, wanted)
    from btx.stages.evaluate import evaluate_beside  # here, so that what is refused before is refused at once

    interrupts = Interrupts().listen()
    evaluate_beside(run, wanted, forget, interrupts, silent if quiet else interrupts.tell)


def analyze(
    model_and_texts: Annotated[list[str], typer.Argument(
        metavar="RUN|MODEL [NAME=FILE]...", show_default=False,
        help="Run folder; or any MoE model's folder or hub name, with --text.")],
    text: Annotated[list[str] | None, typer.Option(
        "--text", metavar="NAME=FILE", help="Text of a domain (.jsonl, .txt, .parquet, folder); several may follow.",
    )] = None,
    text_key: Annotated[str, typer.Option(
        metavar="KEY", help="Key of the text on the lines of .jsonl files; column of .parquet files.")] = TEXT_KEY,
    output: Annotated[Path | None, typer.Option(
        "-o", "--output", help="Folder to write; default: MODEL-analysis here.", show_default=False)] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text, at most.")] = TOKENS,
    examples: Annotated[int, typer.Option(min=0, help="Documents of each text shown token by token.")] = EXAMPLES,
    without: Annotated[list[str] | None, typer.Option(
        "--without", "--drop", metavar="EXPERT", help="Analyse with this expert dropped; repeat.")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Find out which expert each token uses: of a run's model, or of any MoE model on texts of yours."""
    place, texts = _place_and_pairs("analyze", model_and_texts, text or [], "--text", "FILE")
    if is_run(Path(place)):
        check_run_alone(
            Path(place), texts, text_key != TEXT_KEY, output, without, tokens != TOKENS, examples != EXAMPLES
        )
        work_on(Path(place), ["analyze"], quiet=as_json)
        if as_json:
            show_json(read_output(Path(place) / "analyze" / "routing.json"))
        return
    from btx.python.commands import analyze as analyze_model

    output = output or default_output(place)
    analysis = analyze_model(place, texts, output, text_key=text_key, tokens=tokens, examples=examples,
                             without=without or (), log=silent if as_json else typer.echo)  # fmt: skip
    show_json(analysis.routing) if as_json else typer.echo(f"report: {output / 'index.html'}")


def default_output(model: str) -> Path:
    """Where the analysis of a model goes: a folder here that is called after it."""
    path = Path(model.removeprefix("hf:")).absolute()
    return Path(f"{path.parent.name if path.name == 'model' else path.name}-analysis")


def _place_and_pairs(
    command: str, arguments: list[str], options: list[str], option: str, kind: str
) -> tuple[str, dict[str, Path]]:  # fmt: skip
    """The one argument that is a folder or hub name, and the NAME=PATH pairs: `--text a=A b=B` is `--text a=A --text
    b=B`, and a shell's user writes either.

    Raises:
        UserError: no such argument or several, no pair, or a name given twice.
    """
    more = [each for each in arguments if options and "=" in each and not Path(each).exists()]
    places = [each for each in arguments if each not in more]
    if len(places) != 1:
        said = " and ".join(places) or "none"
        raise UserError(f"btx {command}: one folder is wanted, and {said} were named" if places else
                        f"btx {command}: no folder is named, only {option}")  # fmt: skip
    return places[0], named([*options, *more], option, kind)


def compare(
    run_folder: RunArgument,
    model_a: Annotated[str, typer.Argument(
        help="Name of a model in the results.", autocompletion=completing_names.models)] = "btx",
    model_b: Annotated[str | None, typer.Argument(
        help="What it is compared with; default: every other.", autocompletion=completing_names.models)] = None,
    other_run: Annotated[Path | None, typer.Option(
        "--with", help="Run folder whose models it is compared with, another variant of a sweep for example.")] = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples.")] = 2000,
    rng_seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Random number seed of the resampling.")] = 0,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """How sure the differences between models are: paired bootstrap over documents and questions."""
    from btx.evaluation.compare import compare_models

    run, other = open_run(run_folder), None if other_run is None else open_run(other_run)
    for measured in (run, *([other] if other else [])):
        for name, why in measured.stale("evaluate").items():
            remark(f"warning: {measured.path}: {name} is stale ({why}): what is compared are models that were there "
                   f"before; `btx run {measured.path}` makes it anew")  # fmt: skip
    comparison = compare_models(
        run.path, model_a, model_b, other_run=other.path if other else None, resamples=resamples, rng_seed=rng_seed
    )
    if as_json:
        show_json(comparison)
    else:
        from btx.cli.tables import comparison_table

        show(comparison_table(comparison))


def report(
    run_folder: RunArgument,
    beside: Annotated[Path | None, typer.Option(
        "--with", help="Another run, or an analysed model's folder: its tokens beside those of the same text.")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write the run's report, whatever stage it has reached."""
    from btx.reporting.report import write_report
    from btx.reporting.run_files import MEASURING
    from btx.run_folder.folder import exclusive

    run = open_run(run_folder)
    with exclusive(run.path, "report", patience_s=60.0):
        path = write_report(run.path, beside=beside, stale=run.stale(*MEASURING))
    show_json({"report": str(path)}) if as_json else typer.echo(path)
