"""The tensors of a seed model with a LoRA adapter merged in, one at a time when they are read; no model is ever whole.

W + s B A is computed in float32 and rounded once to W's type: in float32 bit for bit what peft's merge_and_unload
gives, and what a folder with the merged model would hold.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from btx.errors import CheckpointError, first_few
from btx.model_files.adapter_folder import WEIGHTS, AdapterFolder, LowRank
from btx.model_files.checkpoints import DTYPES, TensorFolder
from btx.model_files.headers import Entry
from btx.model_files.lazy_tensors import FileTensor, OpenFile, rounded

KEPT = 2
"""Merged weights of an adapter that are kept: the one whose blocks are being read, and the next one."""
MOST_NAMED = 5


def merge_into(tensors: TensorFolder, adapter: AdapterFolder) -> None:
    """Put the merged weights in place of the seed model's, by name.

    Args:
        tensors: the seed model's, without copies that are tied to others.

    Raises:
        CheckpointError: weights that the seed model lacks, or that have another shape there.
    """
    file, problems = adapter.folder / WEIGHTS, []
    if unknown := [name for name in adapter.added if name not in tensors]:
        problems.append(f"{file}: changes {first_few(unknown, MOST_NAMED, ', ...')}, which the seed model in "
                        f"{tensors.folder} does not have as weights of its own")  # fmt: skip
    for name, (a, b, _) in adapter.added.items():
        shape = (b.shape[0], a.shape[1])
        if name in tensors and tensors[name].shape != shape:
            problems.append(f"{file}: {name} would be {shape}, the seed model's is {tensors[name].shape}")
    if problems:
        raise CheckpointError(first_few(problems, MOST_NAMED, "; and {} more like it", "; "))
    merging = _Merging(tensors.who)
    for name, added in adapter.added.items():
        whole = tensors[name]
        tensors.replace(AdaptedTensor(
            tensors.who, name, str(file), whole.shape, whole.dtype, whole.source, whole.offset,
            whole=whole, added=added, merging=merging,
        ))  # fmt: skip


@dataclass(frozen=True)
class AdaptedTensor(FileTensor):
    """A weight of the seed model, or some of its rows, with what an adapter adds to it."""

    whole: FileTensor
    """The seed model's, all rows."""
    added: LowRank
    merging: _Merging

    def finite(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), refused if one is NaN or infinite."""
        first = (self.offset - self.whole.offset) // self.dtype.itemsize
        return self._checked(self.merging(self.whole, self.added)[first + start : first + stop])

    def load(self) -> Tensor:
        """The whole tensor. Nothing may write into it."""
        return self.finite(0, self.numel).view(self.shape)


class _Merging:
    """Merges weights of one adapter, each as a whole, as blocks of a product need not have its bits; keeps the last."""

    def __init__(self, who: str) -> None:
        self.who = who
        self._lock = threading.Lock()
        self._merged = lru_cache(maxsize=KEPT)(self._merge)

    def __call__(self, whole: FileTensor, added: LowRank) -> Tensor:
        """The merged weight, flat."""
        with self._lock:  # else two readers would compute the same weight
            return self._merged(whole, added)

    def _merge(self, whole: FileTensor, added: LowRank) -> Tensor:
        base = whole.load()
        exact = torch.promote_types(base.dtype, torch.float32)
        a, b = (self._read(entry).to(exact) for entry in (added.a, added.b))
        return rounded(base.to(exact) + (b @ a) * added.scaling, whole.dtype).flatten()

    def _read(self, entry: Entry) -> Tensor:
        """A or B, in memory of its own: products of mapped files need not have the same bits."""
        source = OpenFile.shared(entry.file)
        tensor = FileTensor(self.who, "A or B", str(entry.file), entry.shape, DTYPES[entry.dtype], source, entry.start)
        return tensor.finite(0, tensor.numel).view(entry.shape)
