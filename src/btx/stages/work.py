"""Stages in this process: what `btx work RUN STAGE...` does, wherever a launcher starts it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import cast

from btx.outputs import check_outputs
from btx.process import Interrupts, Log, quick_imports
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.graph import Stage
from btx.run_folder.status import trying
from btx.run_folder.stumps import clear_stumps_of
from btx.run_folder.threads import processors, shares_processors, training_threads
from btx.training.trackers.follow import check_trackers

ENDING_S = 60.0  # how long a job waits for an earlier process of the same job that is just saving


def run_stages(run: RunFolder, names: Sequence[str], interrupts: Interrupts, log: Log) -> None:
    """Run stages one after the other in this process; finished ones are skipped, stale ones made anew.

    Args:
        names: stages; a group's name (data, train, baselines) stands for all in it.

    Raises:
        UserError: no such stage, or a stage it needs is not finished.
    """
    for stage in run.graph.named(names, where=str(run.path)):
        name = stage.name
        with exclusive(run.path, name, patience_s=ENDING_S):
            clear_stumps_of(run, name, stage)
            if run.state(stage) == "done" and name != "report":
                check_outputs(run.folder(name))
                log(f"{name}: already done, skipped")
                continue
            if stage.is_tracked:
                check_trackers(run.recipe.track)
            run.check_needs(stage)  # for all stages, and before their modules import torch
            # Training saves before it stops; what the other stages have not written yet is soon made again.
            with trying(run, name), contextlib.nullcontext() if stage.trains else interrupts.at_once():
                with quick_imports():
                    if stage.trains and shares_processors(run.graph, stage):
                        _use_threads(training_threads(run.graph))
                    elif not stage.name.startswith("data/") and name != "report":
                        use_all_processors()
                    work = _work_of(stage)
                work(run, stage, interrupts, log)
            interrupts.raise_if_pending(f"stopped after {name}; run it again to continue")


def use_all_processors() -> None:
    """A stage that runs alone takes every processor, unless OMP_NUM_THREADS says otherwise."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(processors())


def _use_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


WORK = {
    "data": "btx.stages.data:prepare_data",
    "seed": "btx.stages.seed:train_seed",
    "train": "btx.stages.train:train_branch",
    "mix": "btx.stages.mix:mix_experts",
    "finetune": "btx.stages.finetune:finetune",
    "baselines": "btx.stages.baselines:make_baseline",
    "evaluate": "btx.stages.evaluate:evaluate_run",
    "analyze": "btx.stages.analyze:analyze_run",
    "report": "btx.stages.report:report_run",
}
"""First part of a stage's name → what does it; imported when its turn comes."""


def _work_of(stage: Stage) -> Callable[[RunFolder, Stage, Interrupts, Log], None]:
    module, _, function = WORK[stage.name.split("/")[0]].partition(":")
    return cast(Callable[[RunFolder, Stage, Interrupts, Log], None], getattr(import_module(module), function))
