"""Write planned tensors as safetensors shards with an index, block by block, without holding a shard in memory.

Names, shapes and types are all known beforehand, so every file's header is written first and the data follow in
order. One thread reads and computes, another writes.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from btx.checkpoints import DTYPES, INDEX, ONE_FILE
from btx.errors import CheckpointError, RunFolderError
from btx.folders import write_json
from btx.lazy_tensors import LazyTensor, is_finite

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCKS_WAITING = 4
HEADER_BYTES = 160
"""Bytes of a file's header: those that a tensor adds beside its name, at most, and those of an empty header."""
SPARE_BYTES = 50_000_000
"""What has to stay free on the disk beside the weights: tokenizer, records, file system."""


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output: one or more lazy tensors laid one after another."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Sequence[LazyTensor]
    origin: dict[str, Any] = field(default_factory=dict)
    """What it came from, for the record."""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return sum(part.numel for part in self.parts) * self.dtype.itemsize


Progress = Callable[[int, int], None]
"""(bytes written, bytes in all). It may raise to stop the writing."""


def no_progress(written: int, total: int) -> None:
    """Show nothing."""


def require_space(output: Path, tensors: Sequence[OutputTensor]) -> None:
    """Refuse an output that its disk cannot hold.

    Raises:
        RunFolderError: with the bytes needed and free.
    """
    needed = sum(tensor.nbytes for tensor in tensors)
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed + SPARE_BYTES > free:
        raise RunFolderError(
            f"{output}: needs {needed / 1e9:.2f} GB, but {parent} has {free / 1e9:.2f} GB free; nothing was written. "
            f"Free space or choose another disk"
        )


def write_shards(
    folder: Path,
    tensors: Sequence[OutputTensor],
    *,
    max_shard_size: int = 5_000_000_000,
    progress: Progress = no_progress,
) -> int:
    """Write model.safetensors, or shards with an index, into an existing folder.

    Args:
        tensors: what to write, in this order.
        max_shard_size: bytes an output file has at most, its header included (a larger tensor gets its own file).
        progress: called after every block.

    Returns:
        Bytes of tensor data written.
    """
    shards = _shards(tensors, max_shard_size)
    total_bytes, written = sum(tensor.nbytes for tensor in tensors), 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = ONE_FILE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, partial(_shifted, progress, written, total_bytes))
        written += sum(tensor.nbytes for tensor in shard)
        weight_map |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return total_bytes


def write_file(path: Path, tensors: Sequence[OutputTensor], progress: Callable[[int], None]) -> None:
    """Write one safetensors file; `progress` is called with the bytes of tensor data so far."""
    done = 0
    with open(path, "wb", buffering=0) as file, _Writer(file.fileno()) as writer:
        writer.put(torch.frombuffer(bytearray(_header(tensors)), dtype=torch.uint8))
        for tensor, block in _blocks(tensors):
            if tensor.dtype == torch.float16 and not is_finite(block):
                raise CheckpointError(f"{tensor.name}: a value is too large for float16; choose bfloat16 or float32")
            writer.put(block)
            done += block.nbytes
            progress(done)


def _shifted(progress: Progress, before: int, total: int, done: int) -> None:
    """Progress of one shard as progress of all."""
    progress(before + done, total)


def _shards(tensors: Sequence[OutputTensor], max_shard_size: int) -> list[list[OutputTensor]]:
    """Fill one shard after the other, in order."""
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.nbytes + len(tensor.name) + HEADER_BYTES
        if shards[-1] and filled + size > max_shard_size - HEADER_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    # Wide types first, so that every tensor is aligned to its own size.
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _header(tensors: Sequence[OutputTensor]) -> bytes:
    """Length and JSON header of a safetensors file, padded so that the data start at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(tensors: Sequence[OutputTensor]) -> Iterator[tuple[OutputTensor, Tensor]]:
    for tensor in tensors:
        for part in tensor.parts:
            assert part.dtype == tensor.dtype, tensor.name
            for block in part.blocks():
                yield tensor, block


class _Writer:
    """Writes blocks to a file from a thread of its own, a few blocks behind whoever makes them."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting: queue.Queue[Tensor | None] = queue.Queue(_BLOCKS_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._waiting.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def put(self, block: Tensor) -> None:
        """Hand over a block; waits while the disk is behind. Raises what writing raised."""
        if self._error is not None:
            raise self._error
        self._waiting.put(block)

    def _run(self) -> None:
        while (block := self._waiting.get()) is not None:
            if self._error is None and block.numel():
                try:
                    _write_all(self._descriptor, memoryview(block.contiguous().view(torch.uint8).numpy().data))
                except OSError as error:
                    self._error = error


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
