"""Tensors that are not read yet: what the output of a mix is planned from before a byte is written.

A `LazyTensor` knows its shape and type and reads itself, whole or block by block. From a file it is a view of the
mapped file: it costs no memory of its own, and its bytes can be copied as they are.
"""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from btx.errors import CheckpointError

BLOCK_ELEMENTS = 2**21
"""Elements worked on at a time: small enough for the processor's cache, large enough to make calls rare."""

# Floating-point type → integer types of its size, and the smallest pattern of a positive infinity.
_PATTERNS = {
    torch.bfloat16: (np.int16, np.uint16, 0x7F80),
    torch.float16: (np.int16, np.uint16, 0x7C00),
    torch.float32: (np.int32, np.uint32, 0x7F800000),
    torch.float64: (np.int64, np.uint64, 0x7FF0000000000000),
}


class LazyTensor(ABC):
    """A tensor with a known shape and type that is read when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @abstractmethod
    def blocks(self) -> Iterator[Tensor]:
        """The elements in order, as flat tensors of `dtype`; each is finite.

        Raises:
            CheckpointError: NaN or infinity; the message names the tensor and its file.
        """

    def load(self) -> Tensor:
        """The whole tensor."""
        parts = list(self.blocks())
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.shape)

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Rows [start, stop) of the first axis."""
        return Computed((stop - start, *self.shape[1:]), self.dtype, lambda: self.load()[start:stop])


@dataclass(frozen=True)
class FileTensor(LazyTensor):
    """A tensor, or some of its rows, in a mapped safetensors file."""

    who: str
    """Whose it is, for messages: `expert math`."""
    name: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    mapped: mmap.mmap
    offset: int

    def flat(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), a view of the file; unchecked. Nothing may write into it."""
        if start == stop:
            return torch.empty(0, dtype=self.dtype)
        at = self.offset + start * self.dtype.itemsize
        return torch.frombuffer(self.mapped, dtype=self.dtype, count=stop - start, offset=at)

    def finite(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), refused if one is NaN or infinite."""
        block = self.flat(start, stop)
        if not is_finite(block):
            raise CheckpointError(
                f"{self.who}: {self.file}: tensor {self.name} holds NaN or infinity; this model cannot be mixed"
            )
        return block

    def blocks(self) -> Iterator[Tensor]:
        for start in range(0, self.numel, BLOCK_ELEMENTS):
            yield self.finite(start, min(start + BLOCK_ELEMENTS, self.numel))

    def load(self) -> Tensor:
        return self.finite(0, self.numel).view(self.shape)

    def rows(self, start: int, stop: int) -> FileTensor:
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=self.offset + start * row_bytes)


@dataclass(frozen=True)
class Computed(LazyTensor):
    """A tensor computed when it is needed, all at once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], Tensor]

    def blocks(self) -> Iterator[Tensor]:
        result = self.compute()
        assert tuple(result.shape) == self.shape, f"{tuple(result.shape)} computed where {self.shape} was planned"
        yield rounded(result, self.dtype).flatten()


@dataclass(frozen=True)
class Elementwise(LazyTensor):
    """A tensor computed element by element from file tensors of its shape, a block at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Sequence[FileTensor]
    compute: Callable[[Sequence[Tensor]], Tensor]

    def blocks(self) -> Iterator[Tensor]:
        for start in range(0, self.numel, BLOCK_ELEMENTS):
            stop = min(start + BLOCK_ELEMENTS, self.numel)
            yield rounded(self.compute([tensor.finite(start, stop) for tensor in self.inputs]), self.dtype)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Computed:
    """A tensor of zeros."""
    return Computed(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


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

    torch rounds float64 to 16 bits in two steps, by way of float32. A float32 that is not exact is therefore moved to
    its odd neighbour first ("round to odd"), which makes the second step right (Boldo and Melquiond 2008).
    """
    if tensor.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return tensor.to(dtype)
    nearest = tensor.float()
    back = nearest.double()
    inexact = (back != tensor) & (nearest.view(torch.int32) & 1 == 0) & nearest.isfinite()
    if inexact.any():
        away = torch.where(back < tensor, torch.inf, -torch.inf).float()
        nearest = torch.where(inexact, torch.nextafter(nearest, away), nearest)
    return nearest.to(dtype)
