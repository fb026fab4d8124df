"""AdamW with both moments in 8 bits (Dettmers et al., arXiv 2110.02861), from torchao; loads it, and torch, when used.

A moment is held as codes of one byte and a float32 scale for every block of 256 numbers; tensors with fewer than 4096
numbers, or not in whole blocks, keep theirs in the weights' type. torchao rounds bfloat16 weights by chance (stochastic
rounding), with torch's generator: a step's random state decides it. Checked with torchao 0.18.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from btx.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from btx.recipe.training import Training

INSTALL = 'pip install "branchtrainmix[adam8bit]"'
PARTS = ("codes", "scale", "qmap")
"""Tensors of a moment in 8 bits, as torchao names them."""


def is_installed() -> bool:
    """Whether torchao is."""
    return find_spec("torchao") is not None


def check_installed(optimizer: str, where: str = "") -> None:
    """Refuse `optimizer: adamw_8bit` where torchao is not installed; plain Python.

    Args:
        where: the recipe's section, with a dot.

    Raises:
        UserError: with the line that installs it.
    """
    if optimizer == "adamw_8bit" and not is_installed():
        raise UserError(f"{where}optimizer: adamw_8bit needs torchao, which is not installed: {INSTALL}; or leave it "
                        f"at adamw, whose moments take 8 bytes a weight instead of 2")  # fmt: skip


def adamw_8bit(groups: list[dict[str, Any]], settings: Training, device: torch.device) -> torch.optim.Optimizer:
    """torchao's AdamW8bit over parameter groups; those of bfloat16 are rounded by chance.

    It runs compiled on a GPU where Triton and a C compiler are there, else eagerly, with more memory for a moment.

    Raises:
        UserError: torchao is not installed.
    """
    check_installed(settings.optimizer)
    import torch
    from torchao.optim import AdamW8bit

    compiled = device.type == "cuda" and find_spec("triton") and any(map(shutil.which, ("cc", "gcc", "clang")))

    class Eager(AdamW8bit):
        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    kind = AdamW8bit if compiled else Eager
    optimizer: torch.optim.Optimizer = kind(
        groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=1e-8,
        bf16_stochastic_round=True,
    )  # fmt: skip
    return optimizer


def parts_of(moment: Tensor) -> dict[str, Tensor]:
    """A moment as plain tensors, not copied: name of the part, with a dot, → tensor; "" for one that is plain."""
    if not hasattr(moment, PARTS[0]):
        return {"": moment}
    return {f".{part}": getattr(moment, part) for part in PARTS}


def from_parts(parts: Mapping[str, Tensor], parameter: Tensor, *, signed: bool) -> Tensor:
    """The moment of `parameter` that `parts_of` took apart, on its device."""
    parts = {name: part.to(parameter.device) for name, part in parts.items()}
    if "" in parts:
        return parts[""]
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(*(parts[f".{part}"] for part in PARTS), signed, dtype=parameter.dtype)
