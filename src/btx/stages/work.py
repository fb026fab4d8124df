"""Stages in this process: what `btx work RUN STAGE...` does, wherever a launcher starts it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from btx.outputs import check_outputs
from btx.process import Interrupted, Interrupts, Log, ending_if_hung, processes_here, quick_imports, rank, world_size
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.graph import Stage
from btx.run_folder.status import note_failure, trying
from btx.run_folder.stumps import clear_stumps_of
from btx.run_folder.threads import shares_processors, threads_alone, training_threads
from btx.stages.processes import is_shared, train_in_processes, trains_here
from btx.system_errors import told
from btx.training.meeting import node_number
from btx.training.trackers.follow import check_trackers

ENDING_S = 60.0  # how long a job waits for an earlier process of the same job that is just saving


def run_stages(run: RunFolder, names: Sequence[str], interrupts: Interrupts, log: Log) -> None:
    """Run stages one after the other in this process; finished ones are skipped, stale ones made anew. One whose model
    several processes train starts these; where this is one of them already, it does its share.

    Args:
        names: stages; a group's name (data, train, baselines) stands for all in it.

    Raises:
        UserError: no such stage, or a stage it needs is not finished.
    """
    stages = run.graph.named(names, where=str(run.path))
    if world_size() > 1:
        _take_part(run, stages, interrupts, log)
        return
    for stage in stages:
        _check_trackers(run, stage)
        if is_shared(run, stage):
            train_in_processes(run, stage, interrupts, log, run_stages)
        elif node_number() == 0:
            _do(run, stage, interrupts, log)
        interrupts.raise_if_pending(_stopped_after(stage))


def _take_part(run: RunFolder, stages: Sequence[Stage], interrupts: Interrupts, log: Log) -> None:
    """The stages as one of the processes that torchrun has started; all of them stop if a signal came to one."""
    with quick_imports():
        from btx.models.sharding import largest
        from btx.training.joined import joined
        from btx.training.loop import stop_if_asked
    with joined(run.recipe.device, run.recipe.launch.hung_after_s):
        for stage in stages:
            _do(run, stage, interrupts, log if rank() == 0 else lambda line: None)
            stop_if_asked(interrupts, largest(interrupts.pending or 0), _stopped_after(stage))


def _stopped_after(stage: Stage) -> str:
    return f"stopped after {stage.name}; run it again to continue"


def _check_trackers(run: RunFolder, stage: Stage) -> None:
    if run.recipe.track and stage.is_tracked and run.state(stage) != "done":
        check_trackers(run.recipe.track)


def _do(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """A stage in this process. Of several that share its model the first alone holds it and says what is so; the others
    are there for its training only."""
    name, leads, trains = stage.name, rank() == 0, trains_here(run, stage)
    with contextlib.ExitStack() as held:

        def is_done() -> bool:
            _check_trackers(run, stage)
            with interrupts.at_once():  # waiting loses nothing
                held.enter_context(exclusive(run.path, name, patience_s=ENDING_S))
            clear_stumps_of(run, name, stage)
            if run.state(stage) == "done" and name != "report":
                return True
            run.check_needs(stage)  # for all stages, and before their modules import torch
            return False

        if _as_the_first_finds(is_done):
            if leads:
                check_outputs(run.folder(name))
                log(f"{name}: already done, skipped")
            return
        if leads:
            held.enter_context(trying(run, name))
            held.enter_context(ending_if_hung(run.recipe.launch.hung_after_s, partial(_note_hang, run, name)))
        # Training saves before it stops; what the other stages have not written yet is soon made again.
        held.enter_context(contextlib.nullcontext() if stage.trains else interrupts.at_once())
        work = partial(_work, run, stage, interrupts, log)
        if trains:
            work()
            _as_the_first_finds(lambda: None)
        else:
            _as_the_first_finds(work)


def _note_hang(run: RunFolder, stage: str, line: str) -> None:
    note_failure(run, stage, f"{line}; its log says where it stood. `btx run {run.path}` goes on with it; if it was "
                             f"only slow, with a higher launch.hung_after_s")  # fmt: skip


def _work(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    with quick_imports():
        if stage.trains and shares_processors(run.graph, stage):
            _use_threads(training_threads(run.graph))
        elif not stage.name.startswith("data/") and stage.name != "report":
            use_all_processors()
        module, _, function = WORK[stage.name.split("/")[0]].partition(":")
        work = getattr(import_module(module), function)
    work(run, stage, interrupts, log)


def _as_the_first_finds(look: Callable[[], Any]) -> Any:
    """What the first of several processes finds, on all of them, as soon as it has. Where it fails, it says why, and
    the others end without a word.

    Args:
        look: returns a JSON value.
    """
    if world_size() == 1:
        return look()
    from btx.models.sharding import same_everywhere

    if rank() > 0:
        value, exit_code = same_everywhere(None)
        if exit_code is not None and exit_code > 128:
            raise Interrupted("stopped; run it again to continue", exit_code - 128)
        if exit_code is not None:
            raise SystemExit(exit_code)
        return value
    try:
        value = look()
    except BaseException as error:
        known = told(error) if isinstance(error, Exception) else None
        same_everywhere((None, known.exit_code if known is not None else 1))
        raise
    same_everywhere((value, None))
    return value


def use_all_processors() -> None:
    """A stage that runs alone takes every processor, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ or processes_here() > 1:
        _use_threads(threads_alone())


def _use_threads(count: int) -> None:
    """Of the job, shared by its processes on this machine."""
    import torch

    torch.set_num_threads(max(1, count // processes_here()))


WORK = {
    "data": "btx.stages.data:prepare_data",
    "seed": "btx.stages.seed:train_seed",
    "train": "btx.stages.train:train_branch",
    "mix": "btx.stages.mix:mix_experts",
    "finetune": "btx.stages.finetune:finetune",
    "align": "btx.stages.align:align",
    "baselines": "btx.stages.baselines:make_baseline",
    "evaluate": "btx.stages.evaluate:evaluate_run",
    "analyze": "btx.stages.analyze:analyze_run",
    "report": "btx.stages.report:report_run",
}
"""First part of a stage's name → what does it with run, stage, interrupts and log; imported when its turn comes."""
