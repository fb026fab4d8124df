"""Branch (paper, section 2.1): copies of the seed model, each with its own domain and set of trained weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from btx.errors import CheckpointError
from btx.families import family_of
from btx.models import load_model
from btx.moe import weight_parts
from btx.rundir import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PARTS: dict[str, set[str]] = {
    "all": {"routers", "experts", "shared"},
    "all_but_experts": {"routers", "shared"},
    "routers": {"routers"},
    "shared": {"shared"},
}
"""`trainable` of a MoE model → parts that train."""


def branch(run: RunFolder) -> PreTrainedModel:
    """A copy of the run's seed model with the weights that a branch trains set to require gradients."""
    model = load_model(run.model("seed"))
    set_trainable(model, run.recipe.train.trainable)
    return model


def set_trainable(model: PreTrainedModel, which: str) -> None:
    """Choose what trains; everything else gets no gradient and no optimiser state.

    Args:
        which: `all`; `feed_forward` (the FF sublayers of a dense model); `all_but_experts`; `routers`; `shared` (all
            but experts and routers).

    Raises:
        CheckpointError: the model has no such weights.
    """
    if which == "feed_forward":
        config = model.config.to_dict()
        family = family_of(config, "seed model")
        chosen = {name for name, _ in model.named_parameters() if family.is_feed_forward(name, config)}
    else:
        chosen = {name for name, part in weight_parts(model).items() if part in PARTS[which]}
    if not chosen:
        raise CheckpointError(f"trainable: {which} names no weights of {type(model).__name__}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def trainable_parameters(model: nn.Module) -> int:
    """Number of weights that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
