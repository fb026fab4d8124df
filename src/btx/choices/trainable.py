"""Which weights may be told to train: the names behind `train.trainable`, `finetune.trainable` and
those of `align`. No torch.

Which parameters of a model these are is in `btx.models.trainable`.
"""

from __future__ import annotations

DENSE_TRAINABLE = ("all", "feed_forward", "lora")
"""`trainable` of a dense model; feed_forward are its FF sublayers, lora an adapter on each of their projections."""

MOE_TRAINABLE: dict[str, set[str]] = {
    "all": {"routers", "experts", "shared"},
    "all_but_experts": {"routers", "shared"},
    "routers": {"routers"},
    "shared": {"shared"},
}
"""`trainable` of a MoE model → parts that train; shared are all but experts and routers."""

ALIGN_TRAINABLE = (*MOE_TRAINABLE, "lora")
"""`trainable` in the sections of `align`; lora are adapters on the experts and on the attention."""

ONE_PROCESS = "lora is trained by one process, for peft's adapters on experts cannot be sharded"
"""Of the sections of `align`."""


def without_peft(where: str) -> str:
    """What to say of `trainable: lora` in a section of the recipe where peft is not installed."""
    otherwise = "feed_forward" if where == "train" else "all"
    return (
        f"{where}.trainable: lora trains adapters with peft, which is not installed: pip install "
        f'"branchtrainmix[lora]"; or train the weights themselves: {where}.trainable={otherwise}'
    )
