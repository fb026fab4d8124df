"""Write planned tensors as safetensors shards with an index, block by block, without holding a shard in memory.

Names, shapes and types are all known beforehand, so every file's header is written first and the data follow in
order. Reading and computing overlap with writing.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from btx.errors import CheckpointError, RunFolderError
from btx.files import write_json
from btx.model_files.checkpoints import DTYPES
from btx.model_files.direct_file import DirectFile
from btx.model_files.headers import INDEX, ONE_FILE
from btx.model_files.lazy_tensors import LazyTensor, is_finite

_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL"
}  # fmt: skip
HEADER_BYTES = 160
"""Bytes of a file's header: those that a tensor adds beside its name, at most, and those of an empty header."""
READERS = 2
"""Threads that read and compute."""
BYTES_AHEAD = 2**24
"""Bytes read and computed before they are written; a tensor that is computed whole may be larger, but is alone."""
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
    """Refuse an output that its disk cannot hold."""
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
        max_shard_size: bytes an output file has at most, its header included (a larger tensor gets its own file).

    Returns:
        Bytes of tensor data written.
    """
    shards = _shards(tensors, max_shard_size)
    total_bytes, written = sum(tensor.nbytes for tensor in tensors), 0
    weight_map: dict[str, str] = {}

    def told(done: int) -> None:
        progress(written + done, total_bytes)

    for number, shard in enumerate(shards):
        file = ONE_FILE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, told)
        written += sum(tensor.nbytes for tensor in shard)
        weight_map |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return total_bytes


def write_file(path: Path, tensors: Sequence[OutputTensor], progress: Callable[[int], None]) -> None:
    """Write one safetensors file; `progress` is called with the bytes of tensor data so far."""
    done = 0
    with DirectFile(path) as file:
        file.write(file_header({tensor.name: tensor for tensor in tensors}))
        for tensor, block in _blocks(tensors):
            if tensor.dtype == torch.float16 and not is_finite(block):
                raise CheckpointError(f"{tensor.name}: a value is too large for float16; choose bfloat16 or float32")
            file.write(block.contiguous().view(torch.uint8).numpy().data)
            done += block.nbytes
            progress(done)


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


def file_header(tensors: Mapping[str, OutputTensor | Tensor]) -> bytes:
    """Length and JSON header of a safetensors file that holds these in this order, padded so that the data start at a
    multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's elements in order, (bytes,), where the tensor is; not copied if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _blocks(tensors: Sequence[OutputTensor]) -> Iterator[tuple[OutputTensor, Tensor]]:
    """All blocks in order; the next ones are read and computed meanwhile."""
    waiting: deque[tuple[OutputTensor, int, Future[Tensor]]] = deque()
    bytes_waiting = 0
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="reads")
    try:
        for tensor in tensors:
            for part in tensor.parts:
                assert part.dtype == tensor.dtype, tensor.name
                for task in part.tasks():
                    size = task.numel * tensor.dtype.itemsize
                    waiting.append((tensor, size, pool.submit(task.run)))
                    bytes_waiting += size
                    while bytes_waiting > BYTES_AHEAD:
                        ready, done, future = waiting.popleft()
                        bytes_waiting -= done
                        yield ready, future.result()
        while waiting:
            ready, _, future = waiting.popleft()
            yield ready, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
