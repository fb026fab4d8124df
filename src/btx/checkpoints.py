"""Streaming safetensors: read tensors one at a time from a model folder, write shards with an index.

Peak memory is about one output shard plus the largest tensor, whatever the size of the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from btx.errors import CheckpointError
from btx.folders import write_json

INDEX = "model.safetensors.index.json"


class TensorFolder:
    """The tensors of a model folder, read lazily by name.

    Raises:
        CheckpointError: no safetensors, a missing or truncated shard, an index that names absent tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[str, safe_open] = {}
        self._file_of: dict[str, str] = {}
        index = folder / INDEX
        if index.is_file():
            try:
                listed = json.loads(index.read_text("utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index}: not a safetensors index: {error}") from error
            for file in sorted(set(listed.values())):
                self._open(str(file))
            absent = sorted(name for name, file in listed.items() if self._file_of.get(name) != file)
            if absent:
                raise CheckpointError(f"{index}: names tensors that their shard does not hold: {', '.join(absent[:5])}")
        elif (folder / "model.safetensors").is_file():
            self._open("model.safetensors")
        else:
            raise CheckpointError(f"{folder}: no weights: neither model.safetensors nor {INDEX}")

    def _open(self, file: str) -> None:
        if Path(file).name != file:
            raise CheckpointError(f"{self.folder / INDEX}: shard {file!r} lies outside the folder")
        try:
            shard = safe_open(self.folder / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file}: not a readable safetensors file: {error}") from error
        self._shards[file] = shard
        self._file_of.update(dict.fromkeys(shard.keys(), file))

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._shards[self._file_of[name]].get_slice(name).get_shape())

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        return self._shards[self._file_of[name]].get_tensor(name)

    def where(self, name: str) -> str:
        """File a tensor lies in, for messages."""
        return str(self.folder / self._file_of[name])


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], *, max_shard_size: int = 5_000_000_000) -> int:
    """Write tensors in the order they come, a new shard whenever one is full.

    Args:
        folder: an existing folder; model.safetensors, or shards with an index, are written into it.
        tensors: (name, tensor) pairs, consumed one by one.
        max_shard_size: bytes a shard holds at most (a larger tensor gets its own).

    Returns:
        Bytes of tensor data written.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards):05d}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        size = tensor.nbytes
        if pending and pending_bytes + size > max_shard_size:
            flush()
            pending_bytes = 0
        pending[name] = tensor.contiguous()
        pending_bytes += size
        total_bytes += size
    flush()
    _name_shards(folder, shards, total_bytes)
    return total_bytes


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """The number of shards is part of their published names and known only at the end."""
    if len(shards) == 1:
        (folder / "shard-00000.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number:05d}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def require_finite(name: str, tensor: Tensor, where: str) -> Tensor:
    """`tensor`, unless it holds NaN or infinity.

    Raises:
        CheckpointError: it does; the message names tensor and file.
    """
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise CheckpointError(f"{where}: tensor {name} holds NaN or infinity; this model cannot be mixed")
    return tensor
