"""Finetune the mixed model (paper, section 2.2): next-token loss plus load balancing, on all domains' data."""

from __future__ import annotations

from btx.data.mixture import finetune_mixture
from btx.running.graph import Stage
from btx.running.interrupts import Interrupts
from btx.running.rundir import RunFolder
from btx.training.train import Log, train_moe


def finetune(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Finetune the run's mixed model; same training path as the branches."""
    run.begin(stage)
    recipe = run.recipe
    train_moe(
        run, stage, run.model("mix"), recipe.finetune, [finetune_mixture(recipe)], interrupts, log,
        routing=recipe.routing, experts=recipe.expert_names,
    )  # fmt: skip
