"""Which weights of a model train. The names that choose them are in `btx.choices.trainable`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from btx.choices.families import family_of
from btx.choices.trainable import MOE_TRAINABLE
from btx.errors import CheckpointError
from btx.moe.layer import weight_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trainable_names(model: PreTrainedModel, which: str) -> set[str]:
    """Names of the parameters that train.

    Args:
        model: with btx's MoE blocks in place; one on the meta device will do.
        which: a name in `btx.choices.trainable`, of the model's kind.
    """
    if which == "feed_forward":
        config = model.config.to_dict()
        family = family_of(config, "seed model")
        chosen = {name for name, _ in model.named_parameters() if family.is_feed_forward(name, config)}
    else:
        chosen = {name for name, part in weight_parts(model).items() if part in MOE_TRAINABLE[which]}
    if not chosen:
        raise CheckpointError(f"trainable: {which} names no weights of {type(model).__name__}")
    return chosen


def set_trainable(model: PreTrainedModel, which: str) -> None:
    """Choose what trains, as `trainable_names`; everything else gets no gradient and no optimiser state."""
    chosen = trainable_names(model, which)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
