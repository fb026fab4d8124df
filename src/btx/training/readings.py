"""Values of a step on their way from the device to Python, in one copy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class Readings:
    """Copies of some tensors on the host, small and of any shape. On a GPU nothing waits until they are asked for: the
    copy goes to pinned memory behind what the device is doing, and an event tells when it has arrived.

    Args:
        values: name → tensor, all on one device.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._shapes = {name: value.shape for name, value in values.items()}
        flat = torch.cat([value.detach().flatten() for value in values.values()])  # in the widest of their types
        self._event: torch.cuda.Event | None = None
        if flat.device.type == "cuda":
            self._flat = torch.empty_like(flat, device="cpu", pin_memory=True).copy_(flat, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flat.device))
        else:
            self._flat = flat

    def wait(self) -> dict[str, Tensor]:
        """The values, as soon as the device has come to them."""
        if self._event is not None:
            self._event.synchronize()
        parts = self._flat.split([math.prod(shape) for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
