"""Finetune the mixed model (paper, section 2.2): next-token loss plus load balancing, on all domains' data."""

from __future__ import annotations

from btx.branch import set_trainable
from btx.graph import Stage
from btx.interrupts import Interrupts
from btx.mixture import finetune_mixture
from btx.models import load_model
from btx.rundir import RunFolder
from btx.train import Log, train_stage


def finetune(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Finetune the run's mixed model; same training path as the branches."""
    run.begin(stage)
    start = run.model("mix")
    model = load_model(start)
    set_trainable(model, run.recipe.finetune.trainable)
    train_stage(
        run, stage, model, run.recipe.finetune, finetune_mixture(run.recipe), interrupts, log,
        like=start, load_balancing=run.recipe.finetune.load_balancing,
    )  # fmt: skip
