"""Branch (paper, section 2.1): copies of the seed model, each with its own domain and set of trained weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from btx.model_files.models import load_model
from btx.running.rundir import RunFolder
from btx.training.trainable import set_trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def branch(run: RunFolder) -> PreTrainedModel:
    """A copy of the run's seed model with the weights that a branch trains set to require gradients."""
    model = load_model(run.model("seed"))
    set_trainable(model, run.recipe.train.trainable)
    return model
