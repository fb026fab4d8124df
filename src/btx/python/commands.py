"""The commands as functions: each takes a run (its `RunFolder`, or the path) and does what its command does.

Whatever goes wrong is an exception of `btx.errors`; nothing ends the interpreter. A kernel's interrupt, as Ctrl-C, lets
training save first and then raises `Interrupted`: the same call goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from btx.errors import RunFolderError, UserError
from btx.evaluation.analysis_request import EXAMPLES, TEXT_KEY, TOKENS, check_analysis, check_run_alone, read_texts
from btx.model_files.hub import folder_or_name
from btx.outputs import read_output
from btx.process import Interrupts, Log
from btx.python.results import Analysis, Comparison, Evaluation, SweepResults
from btx.reporting.paired_bootstrap import RESAMPLES
from btx.reporting.shapes import Results, Routing
from btx.run_folder.folder import RunFolder

Run = RunFolder | str | Path


def _print(line: str) -> None:
    print(line, flush=True)


def evaluate(
    run: Run, models: Mapping[str, str | Path] | None = None, *, forget: Sequence[str] = (), log: Log = _print
) -> Evaluation:
    """Measure every model of a run on held-out text and tasks, and others beside it; what is measured already stays.

    Args:
        run: a run whose models are there.
        models: name → folder or hub name of another model, which stays in the run's results.
        forget: names of other models to take out of them.
        log: called with lines for the user.

    Raises:
        RunFolderError: a model of the run is not finished.
        UserError: another model's name or folder cannot be.
        Interrupted: an interrupt came; what was measured of whole models stays.
    """
    _refuse_text(forget=forget)
    if models or forget:
        from btx.stages.evaluate import evaluate_beside

        beside = {name: folder_or_name(path) for name, path in (models or {}).items()}
        with Interrupts() as interrupts:
            evaluate_beside(opened := _opened(run), beside, forget, interrupts, log)
    else:
        opened = _work_on(run, ["evaluate"], log)
    return Evaluation(_read(opened, "evaluate/results.json", Results)["models"])


def analyze(
    model: Run, texts: Mapping[str, str | Path] | None = None, output: str | Path | None = None, *,
    text_key: str = TEXT_KEY, tokens: int = TOKENS, examples: int = EXAMPLES, without: Sequence[str] = (),
    log: Log = _print,
) -> Analysis:  # fmt: skip
    """Find out which expert each token uses: of a run's model on its held-out text, or of any MoE model on texts.

    Args:
        model: a run; or, with `texts`, folder or hub name of any MoE model of transformers.
        texts: domain → file or folder of text.
        output: folder for the analysis of a model, with its report.
        text_key: key of the text on the lines of .jsonl files, or column of .parquet files.
        tokens: of each text, at most.
        examples: documents of each text shown token by token.
        without: experts that are dropped.
        log: called with lines for the user.

    Raises:
        UserError: no such run, model or text, or a dense model.
        Interrupted: an interrupt came while a run was analysed.
    """
    _refuse_text(without=without)
    if texts is None:
        run = _opened(model)
        check_run_alone(run.path, text_key != TEXT_KEY, output, without, tokens != TOKENS, examples != EXAMPLES)
        routing = _read(_work_on(run, ["analyze"], log), "analyze/routing.json", Routing)
    elif output is None or isinstance(model, RunFolder):
        raise UserError("analyze: texts go with a model and the folder that its analysis is written to: "
                        "analyze(MODEL, {NAME: FILE}, FOLDER)")  # fmt: skip
    else:
        place, paths = folder_or_name(model), {name: Path(path) for name, path in texts.items()}
        check_analysis(place, paths, Path(output))
        documents = read_texts(paths, tokens, text_key)
        from btx.evaluation.analyze_model import analyze_model  # here, so that what is refused before comes at once

        routing = analyze_model(place, documents, Path(output), tokens=tokens, examples=examples, without=without,
                                log=log)  # fmt: skip
    return Analysis(routing["experts"], routing["layers"], routing)


def compare(
    run: Run, model: str = "btx", other: str | None = None, *, other_run: Run | None = None,
    resamples: int = RESAMPLES, rng_seed: int = 0,
) -> Comparison:  # fmt: skip
    """How sure the differences between models are: paired bootstrap over documents and questions.

    Args:
        run: an evaluated run.
        model: name of a model in its results.
        other: what it is compared with; None: every other.
        other_run: an evaluated run that the others are taken from; None: the same one.
        resamples: draws of documents.
        rng_seed: random number seed of the draws.

    Raises:
        UserError: no such model, or runs that were measured on different documents.
    """
    from btx.evaluation.compare import compare_models

    others = None if other_run is None else _opened(other_run).path
    compared = compare_models(
        _opened(run).path, model, other, other_run=others, resamples=resamples, rng_seed=rng_seed
    )  # fmt: skip
    return Comparison(compared["model"], compared["models"], compared["resamples"])


def adopt(run: Run, domain: str, model: str | Path, *, log: Log = _print) -> RunFolder:
    """Take an expert model that was trained elsewhere for a branch's; it is checked, copied and never trained here.

    Args:
        run: a run whose seed model is there.
        domain: a branch of its recipe.
        model: folder of the expert model, or of a LoRA adapter of the seed model.
        log: called with lines for the user.

    Raises:
        UserError: no such branch, or the model does not fit the seed model.
    """
    from btx.model_files.model_folder import check_expert_folder

    opened = _opened(run)
    check_expert_folder(Path(model))
    from btx.stages.adopt import adopt as adopt_model  # here, so that what is refused before is refused at once

    adopt_model(opened, domain, Path(model), log)
    return RunFolder.open(opened.path)


def align(run: Run, *, log: Log = _print) -> RunFolder:
    """Train the finetuned model of a run on conversations, then on preferences: what its recipe has under `align`.

    Raises:
        UserError: the recipe has no `align`.
        Interrupted: an interrupt came, and all is saved; the same call goes on.
    """
    if not _opened(run).graph.aligned:
        raise UserError(f"{_opened(run).path}: the recipe has no `align`; it says what to train on (docs/after.md)")
    return _work_on(run, ["align"], log)


def sweep(
    recipe: str | Path, vary: Mapping[str, Sequence[Any]] | None = None, overrides: Sequence[str] = (), *,
    rng_seeds: int | None = None, models: Sequence[str] | None = None, share: Sequence[str | Path] = (),
    jobs: int = 1, log: Log = _print,
) -> SweepResults:  # fmt: skip
    """Variants of a recipe times rng seeds, sharing what they have in common.

    Args:
        recipe: name of a packaged recipe, a file, or a run folder.
        vary: dotted key → its values: `{"mix.top_k": [1, 2]}`; every combination is a variant.
        overrides: `key=value` for all variants.
        rng_seeds: how many of every variant; None: the recipe's, or 3.
        models: models the table shows; None: all.
        share: run folders, or sweeps', whose finished stages are taken over.
        jobs: runs at a time.
        log: called with lines for the user.

    Raises:
        UserError: a recipe, setting or model that cannot be; each with its variant.
        StageFailed: runs failed; all others were run to their end.
        Interrupted: an interrupt came; all runs have saved.
    """
    from btx.recipe.loading import inline_yaml
    from btx.running.preflight import preflight
    from btx.sweeps.starting import check_plans, starter
    from btx.sweeps.sweep import sweep as run_sweep
    from btx.sweeps.variants import plan_sweep

    _refuse_text(overrides=overrides, models=models, share=share)
    _refuse_text(**{f"vary {key}": values for key, values in (vary or {}).items()})
    varied = [f"{key}={','.join(inline_yaml(value) for value in values)}" for key, values in (vary or {}).items()]
    planned = plan_sweep(str(recipe), [*overrides, *varied], rng_seeds=rng_seeds, models=models, jobs=jobs,
                         check=preflight)  # fmt: skip
    check_plans(planned)
    written = run_sweep(planned, starter(jobs), share=[Path(place) for place in share], jobs=jobs, log=log)
    return SweepResults(planned.folder, written)


def _refuse_text(**several: Any) -> None:
    """Refuse one text where several things are wanted: Python would take its letters for them."""
    for name, value in several.items():
        if isinstance(value, str):
            raise UserError(f"{name}: a list is wanted, here [{value!r}], not the text alone")


def _opened(run: Run) -> RunFolder:
    """The run as its files say now."""
    return RunFolder.open(run.path if isinstance(run, RunFolder) else Path(run))


def _work_on(run: Run, stages: list[str], log: Log) -> RunFolder:
    """Do stages in this process; returns the run as it is then."""
    from btx.stages.work import run_stages

    opened = _opened(run)
    with Interrupts() as interrupts:
        run_stages(opened, stages, interrupts, log)
    return RunFolder.open(opened.path)


def _read(run: RunFolder, file: str, shape: Any) -> Any:
    written = read_output(run.path / file, shape)
    if written is None:
        raise RunFolderError(f"{run.path / file}: somebody removed it while it was to be read")
    return written
