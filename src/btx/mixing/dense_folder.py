"""Dense models of the seed model's class, written from the models of a mix: a soup, an expert that was an adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from btx.files import write_json
from btx.mixing.inputs import MixInputs
from btx.mixing.moe_layout import fused_again
from btx.model_files.beside_weights import copy_beside_weights
from btx.model_files.shard_writer import OutputTensor, require_space, write_shards
from btx.models.configs import as_the_files_say


def write_dense(inputs: MixInputs, tensors: Sequence[OutputTensor], folder: Path) -> None:
    """Write tensors, of the seed model's names with fused ones in parts, as a model into an existing folder.

    Config, tokenizer and generation settings are the seed model's.
    """
    copy_beside_weights(inputs.seed_model, folder)
    declared = json.loads((folder / "config.json").read_text("utf-8"))
    if (true := as_the_files_say(declared, inputs.seed_model)) != declared:
        write_json(folder / "config.json", true)
    write_shards(folder, fused_again(inputs, tensors))


def write_expert(inputs: MixInputs, name: str, folder: Path) -> None:
    """Write one expert as a model of its own, an adapter merged into the seed model."""
    tensors = inputs.expert_tensors[name]
    planned = [OutputTensor(n, tensors[n].shape, tensors[n].dtype, [tensors[n]]) for n in tensors.names]
    require_space(folder, planned)
    write_dense(inputs, planned, folder)
