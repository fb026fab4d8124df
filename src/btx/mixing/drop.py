"""Remove an expert from a finished MoE model: its weights and its router row (FlexOlmo, arXiv 2507.07024).

Nothing else changes: routing among the other experts stays as it was. The shared weights keep what the expert put into
their mean; where that matters, mix again without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from btx.errors import CheckpointError
from btx.mixing.moe_folder import MoeFolder
from btx.model_files.checkpoints import allow_open_files
from btx.model_files.hub import local_model
from btx.model_files.lazy_tensors import Computed, FileTensor
from btx.model_files.shard_writer import OutputTensor
from btx.recipe.sizes import bytes_of


def drop(
    moe: str | Path,
    expert: str,
    output: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write a MoE model without one of its experts.

    Args:
        moe: folder of the MoE model.
        expert: name of the expert, as the model has it; its number if it has no names.
        output: folder to write; it appears when it is complete.
        max_shard_size: size an output file has at most, in bytes or as `500MB`.
        log: called with lines for the user.

    Returns:
        mix.json, as written.

    Raises:
        CheckpointError: no such expert, too few experts left, or not a MoE folder.
    """
    moe, output = local_model(Path(moe)), Path(output)
    allow_open_files((moe,))
    model = MoeFolder.open(moe)
    if expert not in model.names:
        raise CheckpointError(f"{moe}: has no expert {expert!r}; its experts: {', '.join(model.names)}")
    left = [name for name in model.names if name != expert]
    if len(left) < 2:
        raise CheckpointError(f"{moe}: without {expert} one expert is left, which is no mixture; use its dense model")
    if model.top_k > len(left):
        raise CheckpointError(f"{moe}: a token uses {model.top_k} experts, but only {len(left)} would be left")
    changes = {
        "family": model.record.get("family", f"? -> {model.family.moe}"),
        "paths": {name: path for name, path in model.record["paths"].items() if name != expert},
        "inputs": {name: origin for name, origin in model.record["inputs"].items() if name != expert},
        "next": "finetune {output} for a short while: its shared weights were trained or merged with the expert",
    }
    planned = list(_planned(model, model.names.index(expert)))
    record = model.write_with(left, planned, output, changes, {"drop": expert}, bytes_of(max_shard_size))
    log(f"drop: {expert} removed; shared weights are left as they were")
    return record


def _selected(tensor: FileTensor, axis: int, kept: list[int]) -> Tensor:
    return tensor.load().index_select(axis, torch.tensor(kept))


def _planned(model: MoeFolder, gone: int) -> Iterator[OutputTensor]:
    """All tensors without expert `gone`, those after it renumbered."""
    for name in model.tensors.names:
        tensor, place = model.tensors[name], model.place_of(name)
        if model.holds_all_experts(name):
            parts = [tensor.rows(0, gone), tensor.rows(gone + 1, tensor.shape[0])]
            shape = (tensor.shape[0] - 1, *tensor.shape[1:])
            origin = "router" if len(shape) == 2 else "stack"
            yield OutputTensor(name, shape, tensor.dtype, parts, {"from": origin})
        elif (axis := model.expert_axis(name)) is not None:
            shape = tuple(size - (number == axis) for number, size in enumerate(tensor.shape))
            kept = [number for number in range(tensor.shape[axis]) if number != gone]
            part = Computed(shape, tensor.dtype, partial(_selected, tensor, axis, kept))
            yield OutputTensor(name, shape, tensor.dtype, [part], {"from": "zeros"})
        elif place is None:
            yield OutputTensor(name, tensor.shape, tensor.dtype, [tensor], {"from": "shared"})
        elif place[2] != gone:
            pattern, layer, number = place
            new_name = pattern.format(layer=layer, expert=number - (number > gone))
            yield OutputTensor(new_name, tensor.shape, tensor.dtype, [tensor], {"from": "copy"})
