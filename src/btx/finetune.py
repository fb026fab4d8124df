"""Finetune the mixed model (paper, section 2.2): next-token loss plus load balancing, on all domains' data."""

from __future__ import annotations

from btx.balancing import Balancing
from btx.branch import set_trainable
from btx.graph import Stage
from btx.interrupts import Interrupts
from btx.mixture import finetune_mixture
from btx.models import load_model
from btx.moe import moe_blocks, set_router
from btx.rundir import RunFolder
from btx.train import Log, train_stage


def finetune(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """Finetune the run's mixed model; same training path as the branches."""
    run.begin(stage)
    start, settings = run.model("mix"), run.recipe.finetune
    model = load_model(start)
    if not moe_blocks(model):
        log(f"warning: {type(model).__name__} has routers of its own kind: no load balancing, no routing metrics")
    set_router(model, run.recipe.routing)
    for block in moe_blocks(model):
        block.dense_router_gradient = settings.dense_router_gradient
    set_trainable(model, settings.trainable)
    train_stage(
        run, stage, model, settings, finetune_mixture(run.recipe), interrupts, log,
        like=start, balancing=Balancing.of(settings),
    )  # fmt: skip
