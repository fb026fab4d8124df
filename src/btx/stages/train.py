"""Branch (paper, section 3.1): copies of the seed model, each with its own domain and set of trained weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from btx.models.adapters import add_adapters
from btx.models.trainable import set_trainable
from btx.process import Interrupts, Log
from btx.recipe.mixtures import domain_mixture
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.stages.training import start_model, train_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def branch(run: RunFolder) -> PreTrainedModel:
    """A copy of the run's seed model with the weights that a branch trains set to require gradients."""
    train = run.recipe.train
    model = start_model(run.model("seed"), whole=train.trainable == "lora")
    if train.trainable == "lora":
        add_adapters(model, train.lora.rank, train.lora.alpha, rng_seed=run.recipe.rng_seed)
    else:
        set_trainable(model, train.trainable)
    return model


def train_branch(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log) -> None:
    """One expert model: the seed model's copy, trained further on its domain with some general text."""
    domain = stage.name.removeprefix("train/")
    mixture = domain_mixture(run.recipe, domain)
    settings = run.recipe.branch_training(domain)
    train_stage(run, stage, branch(run), settings, [mixture], interrupts, log, start=run.model("seed"),
                like=run.model("seed"))  # fmt: skip
