"""Where models run, and in which arithmetic they are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from btx.errors import UserError
from btx.models.measuring_memory import ANSWERING, SCORING
from btx.models.placement import Place

if TYPE_CHECKING:
    from btx.recipe.schema import Recipe
    from btx.recipe.training import Training


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one; cuda without one is refused."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no GPU; use device=auto or device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def gpu_count() -> int:
    """GPUs that torch sees, none of which is touched."""
    return torch.cuda.device_count()


def device_and_type(recipe: Recipe) -> tuple[str, torch.dtype]:
    """Where and in which arithmetic models are measured: as `evaluate.precision` says, and if that is auto float32,
    except on a GPU in a run that finetunes in bfloat16."""
    device, precision = choose_device(recipe.device), recipe.evaluate.precision
    if precision == "auto":
        precision = recipe.finetune.precision if device.type == "cuda" else "float32"
    return device.type, torch.bfloat16 if in_bfloat16(precision, device) else torch.float32


def measuring_place(recipe: Recipe, log: Callable[[str], None], *, answers: bool = False) -> Place:
    """Where and in which type the models of a run are measured.

    Args:
        log: called with a line where a model does not fit one device.
        answers: whether they answer questions, whose keys and values then need room too.
    """
    device, dtype = device_and_type(recipe)
    return Place(device, dtype, ANSWERING if answers else SCORING, recipe.launch.weights_per_device, log)


def in_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether products are computed in bfloat16 on `device`, weights that train and moments staying in float32.

    bfloat16 does so on every GPU, and on a CPU only if it has units for it: without, emulation is slower than float32
    and less exact. auto does so on GPUs that have units, and on no CPU.
    """
    if device.type == "cpu":
        return precision == "bfloat16" and has_bfloat16_units()
    return precision == "bfloat16" or (precision == "auto" and _gpu_has_units())


def precision_text(training: Training, device: torch.device) -> str:
    """In which arithmetic a training computes here, and why where that is not what the recipe says."""
    precision = training.precision
    if in_bfloat16(precision, device):
        weights = "master weights float32" if training.weights == "float32" else "matrices without float32 masters"
        return f"bfloat16, {weights}" + " (auto: this GPU has units for it)" * (precision == "auto")
    if precision == "bfloat16":
        return "float32 (bfloat16 was asked for, but this CPU has no units for it)"
    why = "results do not depend on the kind of CPU" if device.type == "cpu" else "this GPU has no units for bfloat16"
    return f"float32 (auto: {why})" if precision == "auto" else "float32"


def precision_notes(recipe: Recipe) -> list[str]:
    """A line for each arithmetic that the recipe's trainings would compute in on this machine; none of them is refused
    where only a plan is made for a GPU that is elsewhere."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        return ["precision auto is bfloat16 on a GPU that has units for it; this machine has no GPU to ask"]
    device, trainings = choose_device(recipe.device), dict[str, list[str]]()
    for name, training in (("seed", recipe.seed_model.train), ("train", recipe.train), ("finetune", recipe.finetune)):
        if training is not None:
            trainings.setdefault(precision_text(training, device), []).append(name)
    return [f"precision of {', '.join(names)} on this {device.type.replace('cuda', 'gpu').upper()}: {text}"
            for text, names in trainings.items()]  # fmt: skip


def has_bfloat16_units() -> bool:
    """Whether this machine's CPU multiplies in bfloat16 (AVX512-BF16, AMX or Arm BF16)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(there is True for name, there in capabilities.items() if name.endswith("bf16"))


def _gpu_has_units() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
