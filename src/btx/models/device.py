"""Where models run, and in which arithmetic they are measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from btx.errors import UserError
from btx.models.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from btx.recipe.schema import Recipe


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one.

    Raises:
        UserError: cuda was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no GPU; use device=auto or device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def device_and_type(recipe: Recipe) -> tuple[str, torch.dtype]:
    """Where and in which arithmetic models are measured: float32, except on a GPU in a run that finetunes in bfloat16.

    Raises:
        UserError: the recipe wants a GPU and there is none.
    """
    device = choose_device(recipe.device).type
    in_bfloat16 = device == "cuda" and recipe.finetune.precision == "bfloat16"
    return device, torch.bfloat16 if in_bfloat16 else torch.float32


def load_to_measure(path: Path, recipe: Recipe) -> PreTrainedModel:
    """A model where and in the type it is measured; raises CheckpointError if it cannot be loaded."""
    device, dtype = device_and_type(recipe)
    model = load_model(path, dtype=dtype)
    cast(nn.Module, model).to(device)
    return model


def in_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether products are computed in bfloat16 on `device`, weights that train and moments staying in float32.

    bfloat16 does so on every GPU, and on a CPU only if it has units for it: without, emulation is slower than float32
    and less exact. auto does so on GPUs that have units, and on no CPU.
    """
    if device.type == "cpu":
        return precision == "bfloat16" and has_bfloat16_units()
    return precision == "bfloat16" or (precision == "auto" and _gpu_has_units())


def has_bfloat16_units() -> bool:
    """Whether this machine's CPU multiplies in bfloat16 (AVX512-BF16, AMX or Arm BF16)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(there is True for name, there in capabilities.items() if name.endswith("bf16"))


def _gpu_has_units() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
