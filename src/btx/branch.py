"""Branch (paper, section 2.1): copies of the seed model, each with its own domain and set of trained weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from btx.models import load_model
from btx.rundir import RunFolder
from btx.trainable import trainable_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def branch(run: RunFolder) -> PreTrainedModel:
    """A copy of the run's seed model with the weights that a branch trains set to require gradients."""
    model = load_model(run.model("seed"))
    set_trainable(model, run.recipe.train.trainable)
    return model


def set_trainable(model: PreTrainedModel, which: str) -> None:
    """Choose what trains; everything else gets no gradient and no optimiser state.

    Args and Raises: as `btx.trainable.trainable_names`.
    """
    chosen = trainable_names(model, which)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def trainable_parameters(model: nn.Module) -> int:
    """Number of weights that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
