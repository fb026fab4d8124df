"""What each process writes of a checkpoint, and the parts of all of them read as one.

Of W processes each writes its rows (dimension 0) of every sharded tensor; the first process also writes what is not
sharded. `rows` in state.json says which they are. Nothing but the file system joins parts, so a process waits for no
other while it writes, and any number of processes reads them. Where they lie: `btx.training.checkpoint_files`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from btx.models.sharding import first_row, local_rows, process_number

Rows = dict[str, list[int]]
"""Name of a sharded tensor → number of the first row that is here, then the shape of the whole."""


class PartOfProcess(NamedTuple):
    """What one process writes of some tensors; not copied."""

    tensors: dict[str, Tensor]
    rows: Rows


def part_of_this_process(tensors: Mapping[str, Tensor]) -> PartOfProcess:
    """The rows of sharded tensors that this process holds; the first process also takes what is not sharded."""
    kept = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor) or process_number() == 0}
    rows = {name: [first_row(tensor), *tensor.shape] for name, tensor in kept.items() if isinstance(tensor, DTensor)}
    return PartOfProcess({name: local_rows(tensor) for name, tensor in kept.items()}, rows)


class JoinedFiles(Mapping[str, Tensor]):
    """One file of all parts, read tensor by tensor when asked for one: of a sharded tensor the rows of this process.

    Args:
        parts: file and its `rows`, in order.
        like: name → the weight that a tensor is restored into, or is a moment of.
    """

    def __init__(self, parts: Sequence[tuple[Path, Rows]], like: Mapping[str, Tensor]) -> None:
        self._files = [(safe_open(path, "pt"), rows) for path, rows in parts]
        self._holders: dict[str, list[tuple[Any, Rows]]] = {}
        for file, rows in self._files:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                self._holders.setdefault(name, []).append((file, rows))
        self._like = like

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)

    def __getitem__(self, name: str) -> Tensor:
        holders, like = self._holders[name], self._like.get(name.rpartition("/")[2])
        file, _ = holders[0]
        if like is None or not file.get_slice(name).get_shape():
            whole: Tensor = file.get_tensor(name)
            return whole
        start = first_row(like)
        stop = start + len(local_rows(like))
        pieces = []
        for file, rows in holders:
            part, first = file.get_slice(name), rows[name][0] if name in rows else 0
            low, high = max(start - first, 0), min(stop - first, part.get_shape()[0])
            if low < high:
                pieces.append(part[low:high])
        return torch.cat(pieces) if pieces else torch.empty(0, *like.shape[1:])
