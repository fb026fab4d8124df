"""What the experts of a MoE model are called, whoever saved it last.

config.json holds the names under `btx_experts`: transformers, TRL and peft keep keys they do not know when they save a
model, and vLLM and llama.cpp pass over them. mix.json, in which older mixed models have them alone, stays behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from btx.outputs import read_output
from btx.reporting.shapes import MixRecord

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

KEY = "btx_experts"


def with_names(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A config.json that says what its experts are called."""
    return {**config, KEY: list(names)}


def names_in(config: Mapping[str, Any], count: int) -> list[str] | None:
    """The names that a config.json has for its `count` experts; None where it has none, or none that can be theirs."""
    names = config.get(KEY)
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        return None
    # A name is printed as it is: one that a terminal would take for orders is none.
    return names if len(set(names)) == count and all(name.isprintable() and name for name in names) else None


def expert_names(config: Mapping[str, Any], count: int, folder: Path | None) -> list[str]:
    """The names of a model's experts: those in its config, else those in the record of the mix beside the model or in
    its run, else their numbers.

    Args:
        folder: where it lies; None: on the hub.
    """
    if (names := names_in(config, count)) is not None:
        return names
    home = folder.resolve() if folder is not None else None
    records = [home / "mix.json", home.parent / "mix.json", home.parent.parent / "mix" / "mix.json"] if home else []
    for record in records:
        if record.is_file():
            names = list(read_output(record, MixRecord).get("experts", ()))
            if len(names) == count:
                return names
    return [f"expert {i}" for i in range(count)]


def names_of_experts(model: PreTrainedModel, path: Path) -> list[str]:
    """The names of the experts of a model in memory; empty for a dense one."""
    from btx.moe.any_moe import num_experts  # here, so that a folder can be looked at without torch

    count = num_experts(cast("nn.Module", model))
    return expert_names(model.config.to_dict(), count, path if path.is_dir() else None) if count else []
