"""Finetune the mixed model (paper, section 3.2): next-token loss plus load balancing, on all domains' data."""

from __future__ import annotations

from btx.process import Interrupts, Log
from btx.recipe.mixtures import finetune_mixture
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.stages.training import train_moe


def finetune(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Finetune the run's mixed model; same training path as the branches."""
    recipe = run.recipe
    train_moe(
        run, stage, run.model("mix"), recipe.finetune, [finetune_mixture(recipe)], interrupts, log,
        routing=recipe.routing, experts=recipe.expert_names,
    )  # fmt: skip
