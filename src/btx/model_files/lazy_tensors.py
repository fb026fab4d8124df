"""Tensors that are not read yet: what the output of a mix is planned from before a byte is written.

A `LazyTensor` knows its shape and type and reads itself, whole or block by block.
"""

from __future__ import annotations

import math
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from btx.errors import CheckpointError

BLOCK_ELEMENTS = 2**19
"""Elements copied at a time."""
COMPUTED_ELEMENTS = 2**15
"""Elements computed at a time: small enough for the processor's cache, large enough to make calls rare."""

# Floating-point type → integer types of its size, and the smallest pattern of a positive infinity.
_PATTERNS = {
    torch.bfloat16: (np.int16, np.uint16, 0x7F80),
    torch.float16: (np.int16, np.uint16, 0x7C00),
    torch.float32: (np.int32, np.uint32, 0x7F800000),
    torch.float64: (np.int64, np.uint64, 0x7FF0000000000000),
}


class Task(NamedTuple):
    """A block that can be computed."""

    numel: int
    run: Callable[[], Tensor]


def in_steps(numel: int, step: int, run: Callable[[int, int], Tensor]) -> Iterator[Task]:
    """Tasks for elements [0, numel), `step` at a time."""
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        yield Task(stop - start, partial(run, start, stop))


class LazyTensor(ABC):
    """A tensor with a known shape and type that is read when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @abstractmethod
    def tasks(self) -> Iterator[Task]:
        """How to get the elements in order, block by block, as flat tensors of `dtype`; every task can be run in a
        thread of its own.

        A task raises CheckpointError for NaN or infinity; the message names the tensor and its file.
        """

    def load(self) -> Tensor:
        """The whole tensor."""
        parts = [task.run() for task in self.tasks()]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.shape)

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Rows [start, stop) of the first axis."""
        return Computed((stop - start, *self.shape[1:]), self.dtype, lambda: self.load()[start:stop])


class OpenFile:
    """A file that tensors are read from, by their place."""

    _open: ClassVar[WeakValueDictionary[tuple[int, ...], OpenFile]] = WeakValueDictionary()
    """What a file is to the system → that file, as long as somebody reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    @classmethod
    def shared(cls, path: Path) -> OpenFile:
        """The file, opened once however often it is asked for, unless it was written meanwhile."""
        status = path.stat()
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        opened = cls._open.get(key) or cls(path)
        cls._open[key] = opened
        return opened

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    @cached_property
    def mapped(self) -> mmap.mmap:
        """The whole file as memory that belongs to it. Nothing may write there."""
        return mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)

    def read(self, offset: int, size: int) -> Tensor:
        """Bytes as a tensor of uint8. Reading small blocks is cheaper than mapping them, page by page."""
        block = torch.empty(size, dtype=torch.uint8)
        view = memoryview(block.numpy().data)
        while view:
            got = os.preadv(self._descriptor, [view], offset)
            if got == 0:
                raise CheckpointError(f"{self.path}: the file has become shorter while it was read")
            view, offset = view[got:], offset + got
        return block


@dataclass(frozen=True)
class FileTensor(LazyTensor):
    """A tensor, or some of its rows, in a safetensors file."""

    who: str
    """Whose it is, for messages: `expert math`."""
    name: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: OpenFile
    offset: int

    def finite(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), refused if one is NaN or infinite."""
        size = self.dtype.itemsize
        return self._checked(self.source.read(self.offset + start * size, (stop - start) * size).view(self.dtype))

    def tasks(self) -> Iterator[Task]:
        return in_steps(self.numel, BLOCK_ELEMENTS, self.finite)

    def load(self) -> Tensor:
        """The whole tensor, a view of the mapped file; it costs no memory of its own. Nothing may write into it."""
        if not self.numel:
            return torch.empty(self.shape, dtype=self.dtype)
        view = torch.frombuffer(self.source.mapped, dtype=self.dtype, count=self.numel, offset=self.offset)
        return self._checked(view).view(self.shape)

    def rows(self, start: int, stop: int) -> FileTensor:
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=self.offset + start * row_bytes)

    def _checked(self, values: Tensor) -> Tensor:
        if not is_finite(values):
            raise CheckpointError(
                f"{self.who}: {self.file}: tensor {self.name} holds NaN or infinity; this model cannot be mixed"
            )
        return values


@dataclass(frozen=True)
class Computed(LazyTensor):
    """A tensor computed when it is needed, all at once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], Tensor]

    def tasks(self) -> Iterator[Task]:
        yield Task(self.numel, self._run)

    def _run(self) -> Tensor:
        result = self.compute()
        assert tuple(result.shape) == self.shape, f"{tuple(result.shape)} computed where {self.shape} was planned"
        return rounded(result, self.dtype).flatten()


@dataclass(frozen=True)
class Elementwise(LazyTensor):
    """A tensor computed element by element from file tensors of its shape, a block at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Sequence[FileTensor]
    compute: Callable[[Sequence[Tensor]], Tensor]

    def tasks(self) -> Iterator[Task]:
        return in_steps(self.numel, COMPUTED_ELEMENTS, self._run)

    def _run(self, start: int, stop: int) -> Tensor:
        values = [tensor.finite(start, stop) for tensor in self.inputs]
        if any(value.dtype != self.dtype for value in values):  # rounding is to their own type, or from float64
            values = [value.double() for value in values]
        return rounded(self.compute(values), self.dtype)


def filled(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> Computed:
    """A tensor with one number everywhere."""
    return Computed(shape, dtype, lambda: torch.full(shape, value, dtype=dtype))


def cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """The same values in another type, rounded once; the same object if the type is already right."""
    if tensor.dtype == dtype:
        return tensor
    if isinstance(tensor, FileTensor):
        return Elementwise(tensor.shape, dtype, [tensor], lambda values: values[0])
    if isinstance(tensor, Elementwise | Computed):  # what is computed is exact until it is rounded to the type
        return replace(tensor, dtype=dtype)
    return Computed(tensor.shape, dtype, tensor.load)


def is_finite(tensor: Tensor) -> bool:
    """Neither NaN nor infinity. Read as integers, the largest pattern tells: much faster than asking every element."""
    if tensor.dtype not in _PATTERNS or not tensor.numel():
        return True
    signed, unsigned, infinity = _PATTERNS[tensor.dtype]
    flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    negative_infinity = infinity | 1 << (8 * tensor.dtype.itemsize - 1)
    return bool(flat.view(signed).max() < infinity and flat.view(unsigned).max() < negative_infinity)


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in another type, rounded once to the nearest value.

    torch rounds float64 to 16 bits in two steps, by way of float32, which `nearest_odd` makes right.
    """
    if tensor.dtype == torch.float64 and dtype in (torch.bfloat16, torch.float16):
        tensor = nearest_odd(tensor)
    return tensor.to(dtype)


def nearest_odd(tensor: Tensor) -> Tensor:
    """float64 → float32; a value that is not exact goes to the neighbour whose last bit is 1.

    Rounding that once more to 16 bits gives the 16-bit value nearest to the float64 (Boldo and Melquiond 2008).
    """
    nearest = tensor.float()
    back = nearest.double()
    inexact = (back != tensor) & (nearest.view(torch.int32) & 1 == 0) & nearest.isfinite()
    if inexact.any():
        away = torch.where(back < tensor, torch.inf, -torch.inf).float()
        nearest = torch.where(inexact, torch.nextafter(nearest, away), nearest)
    return nearest
