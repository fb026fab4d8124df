"""Writing one model out of several processes: the bytes that `save_pretrained` writes of it in one process, piece by
piece, so that no process ever has more than its share and the rows of one tensor from one other.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from btx.files import write_text
from btx.model_files.direct_file import DirectFile
from btx.model_files.headers import INDEX
from btx.model_files.shard_writer import file_header, tensor_bytes
from btx.models.published_layout import Published, published_tensors
from btx.models.sharding import local_rows, process_count, process_number, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDE_FIRST = (torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int16,
              torch.int8, torch.uint8, torch.bool)  # fmt: skip
"""The order of types in a file that the safetensors library writes; within a type names are sorted."""


class _Stacked(NamedTuple):
    """What `save_pretrained` has in one piece of memory, and so in one file: an expert's tensor with all other experts'
    of its kind."""

    of: str
    first_row: int
    nbytes: int


def stream_model(
    model: PreTrainedModel, folder: Path, types: Mapping[str, torch.dtype], layout: Collection[str] | None
) -> None:
    """Write config, generation settings and weights into an existing folder. All processes call it; the first writes.

    Args:
        types: name of a tensor in memory → type it is written in; any other keeps its own.
        layout: as `published_tensors` takes it.
    """
    pieces = {piece.name: piece for piece in published_tensors(model, layout)}
    weights, first = model.state_dict(), process_number() == 0
    planned = {
        name: torch.empty(piece.shape, dtype=types.get(piece.of, weights[piece.of].dtype), device="meta")
        for name, piece in pieces.items()
    }
    largest: int | str = inspect.signature(model.save_pretrained).parameters["max_shard_size"].default
    experts = {name: 1 if piece.expert is None else len(weights[piece.of]) for name, piece in pieces.items()}
    split = split_state_dict_into_shards_factory(
        {name: _Stacked(piece.of, piece.first_row, planned[name].nbytes * experts[name])
         for name, piece in pieces.items()},
        get_storage_size=lambda stacked: stacked.nbytes, get_storage_id=lambda stacked: stacked[:2],
        filename_pattern="model{suffix}.safetensors", max_shard_size=largest,
    )  # fmt: skip
    if first:
        _write_settings(model, folder)
    for file, names in split.filename_to_tensors.items():
        with DirectFile(folder / file) if first else nullcontext() as target:
            ordered = sorted(names, key=lambda name: (WIDE_FIRST.index(planned[name].dtype), name))
            if target is not None:
                target.write(file_header({name: planned[name] for name in ordered}))
            for name in ordered:
                for data in _on_first(weights[pieces[name].of], pieces[name], planned[name].dtype):
                    if target is not None:
                        target.write(data.numpy().data)
    if split.is_sharded and first:
        index = {"metadata": {"total_parameters": model.num_parameters(), **split.metadata},
                 "weight_map": split.tensor_to_filename}  # fmt: skip
        write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_settings(model: PreTrainedModel, folder: Path) -> None:
    """What `save_pretrained` writes beside the weights."""
    config: Any = model.config
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # FSDP2 makes a class of its own
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _on_first(weight: Tensor, piece: Published, dtype: torch.dtype) -> Iterator[Tensor]:
    """The bytes of a published tensor in order, on the first process: from each the rows that it holds."""
    for number in range(process_count() if isinstance(weight, DTensor) else 1):
        held = rows_of(weight, number) if weight.ndim else range(1)
        if not held or piece.expert not in (None, *held):
            continue
        if number == process_number():
            rows = local_rows(weight).detach()
            if piece.expert is not None:
                rows = rows[piece.expert - held.start, piece.first_row : piece.first_row + piece.shape[0]]
            data = tensor_bytes(rows.to(dtype))
            if number == 0:
                yield data.cpu()
            else:
                distributed.send(data, 0)
        elif process_number() == 0:
            shape = piece.shape if piece.expert is not None else (len(held), *piece.shape[1:])
            data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=local_rows(weight).device)
            distributed.recv(data, number)
            yield data.cpu()
