"""Copies of tensors in host memory, so that training can change them while they are written; and whether they fit."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from btx.model_files.shard_writer import tensor_bytes
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


def free_memory(process: Path = Path("/proc/self"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that the system, and the limits of a container or batch job (Linux's cgroups), leave.

    Args:
        process, groups: where Linux tells them.
    """
    free = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError):
        for line in (process / "cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                names = ("memory.max", "memory.current") if not controllers else (
                    "memory.limit_in_bytes", "memory.usage_in_bytes")  # fmt: skip
                group = groups / controllers / path.lstrip("/")
                free += [left for folder in (group, *group.parents) if (left := _left(folder, *names)) is not None]
    return min(free)


def _left(group: Path, limit: str, usage: str) -> int | None:
    """Bytes that a group of processes may still take; None without a limit. Its cached files give way."""
    try:
        most, used = (int((group / name).read_text("utf-8")) for name in (limit, usage))
        counts = dict(line.split(maxsplit=1) for line in (group / "memory.stat").read_text("utf-8").splitlines())
    except (OSError, ValueError):  # no such group here, or the limit is the word max
        return None
    return most - used + int(counts.get("inactive_file", 0))
