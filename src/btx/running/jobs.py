"""What each stage does when its turn comes, in its own process. Stage modules are imported when they are needed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence

from btx.errors import UserError
from btx.running.graph import Stage
from btx.running.interrupts import Interrupts
from btx.running.rundir import RunFolder, exclusive
from btx.running.threads import processors, shares_processors, training_threads

Log = Callable[[str], None]

ENDING_S = 60.0  # how long a job waits for an earlier process of the same job that is just saving


def run_stages(run: RunFolder, names: Sequence[str], interrupts: Interrupts, log: Log) -> None:
    """Run stages one after the other in this process; finished ones are skipped, stale ones set aside.

    Raises:
        UserError: no such stage, or a stage it needs is not finished.
    """
    graph = run.graph
    known = [stage.name for stage in graph]
    for name in names:
        if name not in known:
            raise UserError(f"{run.path}: the recipe has no stage {name!r}; there are: {', '.join(known)}")
        stage = graph[name]
        with exclusive(run.path, name, patience_s=ENDING_S):
            if run.state(stage) == "stale":
                log(f"{name}: stale ({run.why_stale(stage)}); moved to {run.set_aside(stage)}")
            if run.state(stage) == "done" and name != "report":
                log(f"{name}: already done, skipped")
                continue
            # Training saves before it stops; what the other stages have not written yet is soon made again.
            with contextlib.nullcontext() if stage.trains else interrupts.at_once():
                if stage.trains and shares_processors(run, stage):
                    _use_threads(training_threads(run))
                elif stage.name not in ("data", "report"):
                    use_all_processors()
                WORK[name.split("/")[0]](run, stage, interrupts, log)
            interrupts.raise_if_pending(f"stopped after {name}; run it again to continue")


def use_all_processors() -> None:
    """A stage that runs alone takes every processor, unless OMP_NUM_THREADS says otherwise."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(processors())


def _use_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _data(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    from btx.data.prepare import prepare_run

    started = time.perf_counter()
    summary = prepare_run(run, stage, log)
    run.finish(stage, tokens=0, flops=0.0, wall_s=time.perf_counter() - started, domains=summary)


def _seed(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    from btx.training.train import train_seed

    train_seed(run, stage, interrupts, log)


def _train(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    from btx.training.train import train_branch

    train_branch(run, stage, interrupts, log)


def _mix(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    from btx.baselines.matching import router_flops
    from btx.mixing.mix import mix
    from btx.model_files.models import read_config
    from btx.moe.expert_text import text_from_run
    from btx.moe.router_init import RouterSettings

    folder, settings, started = run.begin(stage), run.recipe.mix, time.perf_counter()
    routers = RouterSettings(
        settings.router_init, std=settings.router_std, scale=settings.router_scale, ridge=settings.router_ridge,
        tokens=settings.router_tokens,
    )  # fmt: skip
    mix(
        run.model("seed"), {domain: run.model(f"train/{domain}") for domain in run.recipe.train.domains},
        folder / "model", record=folder / "mix.json", generalist=settings.generalist,
        routing=run.recipe.routing, merge=run.recipe.merge_settings, router_init=routers,
        texts=text_from_run(run.path, run.recipe, tokens=routers.tokens) if routers.needs_text else None,
        split=settings.split, split_rescale=settings.split_rescale, blend=settings.blend,
        rng_seed=run.recipe.rng_seed, dtype=settings.dtype, tokenizer_from=settings.tokenizer_from,
        max_shard_size=settings.max_shard_size, log=log,
        progress=lambda written, total: interrupts.raise_if_pending("mix stopped; the same command starts it anew"),
    )  # fmt: skip
    flops = router_flops(run.recipe, read_config(run.model("seed")))
    run.finish(stage, tokens=0, flops=flops, wall_s=time.perf_counter() - started)


def _baselines(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    from btx.baselines.stage import make_baseline

    make_baseline(run, stage, interrupts, log)


def _finetune(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    from btx.training.finetune import finetune

    finetune(run, stage, interrupts, log)


def _evaluate(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    from btx.evaluation.evaluate import evaluate_models
    from btx.running.models_of_run import models_of_run

    run.begin(stage)
    started = time.perf_counter()
    evaluate_models(run.path, run.recipe, models_of_run(run), log=log)
    run.finish(stage, tokens=0, flops=0.0, wall_s=time.perf_counter() - started)


def _analyze(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    from btx.evaluation.analyze import analyze

    run.begin(stage)
    started = time.perf_counter()
    analyze(run.path, run.recipe, run.model("finetune"), log=log)
    run.finish(stage, tokens=0, flops=0.0, wall_s=time.perf_counter() - started)


def _report(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    from btx.reporting.report import write_report

    run.begin(stage)
    started = time.perf_counter()
    path = write_report(run.path)
    run.finish(stage, tokens=0, flops=0.0, wall_s=time.perf_counter() - started)
    log(f"report: {path}")


WORK: dict[str, Callable[[RunFolder, Stage, Interrupts, Log], None]] = {
    "data": _data,
    "seed": _seed,
    "train": _train,
    "mix": _mix,
    "baselines": _baselines,
    "finetune": _finetune,
    "evaluate": _evaluate,
    "analyze": _analyze,
    "report": _report,
}
