"""Counts the bytes of all tensors that are alive, operation by operation: what a training step really holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within it `peak` is the largest sum of bytes of storages that were alive at once; `before` were there already.

    Every operation's results are looked at, forward and backward; a storage counts until the last tensor on it is gone.
    Buffers inside an operation are not seen, but for the largest: a logsumexp takes as much as its input.
    """

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0
        self.see(*before.parameters(), *before.buffers())

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.logsumexp.default:
            self.peak = max(self.peak, self.now + args[0].nbytes)
        result = func(*args, **(kwargs or {}))
        self.see(*(leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)))
        return result

    def see(self, *tensors: torch.Tensor) -> None:
        """Count tensors that are there."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if (key := storage._cdata) not in self.alive:
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key)
