"""What is written while training goes on: tensors are copied within memory, where training cannot change them any more,
and a thread writes the copies into safetensors files, which are hashed as they are written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from torch import Tensor

from btx.model_files.direct_file import BUFFER_BYTES, DirectFile
from btx.model_files.shard_writer import file_header, tensor_bytes
from btx.models.free_memory import free_memory
from btx.training.peak_memory import peak_memory_bytes

BLOCK_BYTES = 2**27
"""Torch rounds pinned memory up to a power of two: blocks of one waste nothing but a part of the last."""


class HostCopy:
    """Host memory for one copy of some tensors, kept for the next one: pages that are touched for the first time cost
    many times what copying into them costs (LOG.md). Pinned where they come from a GPU, which then copies by itself.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None

    def take(self, tensors: Collection[Tensor]) -> None:
        """Copy their bytes, one tensor after the other. A GPU's copies are only put in its queue, before whatever the
        caller lets it do next."""
        pinned = any(tensor.is_cuda for tensor in tensors)
        self._allocate(sum(tensor.nbytes for tensor in tensors), pinned)
        number, filled = 0, 0
        for tensor in tensors:
            source = tensor_bytes(tensor)
            while len(source):
                if filled == len(self._blocks[number]):
                    number, filled = number + 1, 0
                size = min(len(source), len(self._blocks[number]) - filled)
                self._blocks[number][filled : filled + size].copy_(source[:size], non_blocking=pinned)
                source, filled = source[size:], filled + size
        if pinned:
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()

    def pieces(self) -> Iterator[Tensor]:
        """The bytes in order, once they are all here."""
        if self._copied is not None:
            self._copied.synchronize()
        yield from self._blocks

    def _allocate(self, size: int, pinned: bool) -> None:
        """Memory for `size` bytes, that of the last copy if it was as large."""
        if sum(map(len, self._blocks)) != size:
            self._blocks = []  # two copies are never held
            self._blocks = [
                torch.empty(min(BLOCK_BYTES, size - start), dtype=torch.uint8, pin_memory=pinned)
                for start in range(0, size, BLOCK_BYTES)
            ]


def fits_in_host_memory(size: int) -> bool:
    """Whether `size` more bytes can be held for long by a process that will need again what it needed at most. Half of
    what is free counts: another job may just be about to take as much."""
    comes_back = peak_memory_bytes(torch.device("cpu")) - psutil.Process().memory_info().rss
    return size + max(comes_back, 0) < free_memory() / 2


def file_of(tensors: Mapping[str, Tensor], copy: HostCopy | None) -> Callable[[Path], str]:
    """What writes a file of these tensors as they are now, copied into `copy`; without one, as they are when it is
    written. It returns the SHA-256 of the bytes, which costs no second reading; raises OSError; is called once.

    Wide types come first, so that every tensor's place is a multiple of its element's size.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header = file_header(ordered)
    pieces: Iterator[Tensor] = (tensor_bytes(tensor).cpu() for tensor in ordered.values())
    if copy is not None:
        copy.take(ordered.values())
        pieces = copy.pieces()

    def write(path: Path) -> str:
        sha256 = hashlib.sha256(header)
        with DirectFile(path) as file:
            file.write(header)
            for piece in pieces:
                for part in piece.split(BUFFER_BYTES):  # while one is hashed the disk writes those before
                    sha256.update(part.numpy().data)
                    file.write(part.numpy().data)
        return sha256.hexdigest()

    return write


class BackgroundWriter:
    """Writes in a thread of its own. What a piece of writing raised, whoever asks next for the writer raises.

    A process that ends by itself ends after the writing; one that is killed leaves what a killed writer leaves.
    """

    def __init__(self) -> None:
        self._under_way: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Let `write` run, after what was started before has ended; what it reads must not change until it has."""
        self.wait()
        pool = ThreadPoolExecutor(1, thread_name_prefix="writes checkpoints")
        self._under_way = pool.submit(write)
        pool.shutdown(wait=False)  # its thread ends with this piece

    def wait(self) -> None:
        """Until nothing is being written; raises what the writing raised."""
        if self._under_way is not None:
            ended, self._under_way = self._under_way, None
            ended.result()

    def check(self) -> None:
        """Raise what the writing raised, if it has ended; does not wait."""
        if self._under_way is not None and self._under_way.done():
            self.wait()
