"""The GPUs of this machine, and which job has which: a job that trains has some to itself, for two models of the middle
size do not fit one GPU, and a job that is told nothing takes the first."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache

from btx.process import quick_imports

SIGNS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Devices, one of which is there with a driver for GPUs that torch calls cuda (NVIDIA's, Windows', AMD's)."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


@cache
def gpus_here() -> tuple[str, ...]:
    """The GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it. torch, which takes seconds to import,
    is asked only on a machine that has a driver for some."""
    if not any(map(os.path.exists, SIGNS)):
        return ()
    with quick_imports():
        from btx.models.device import gpu_count
    count = gpu_count()
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return tuple(named[:count] or map(str, range(count)))


def gpus_of(device: str) -> tuple[str, ...]:
    """Those that a run may use here; `device` is its recipe's."""
    return () if device == "cpu" else gpus_here()


class Gpus:
    """GPUs that are given to jobs, those first that the fewest jobs have."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._jobs = Counter[str]()
        self._taken: dict[int, list[str]] = {}

    def variables(self, count: int) -> dict[str, str]:
        """Environment of a job that is to see `count` GPUs, in the order in which they are next to be given; nothing
        where there is no choice."""
        if len(self.names) <= count:
            return {}
        least = sorted(self.names, key=lambda name: (self._jobs[name], self.names.index(name)))
        return {VISIBLE: ",".join(sorted(least[:count], key=self.names.index))}

    def take(self, process: int, variables: dict[str, str]) -> None:
        """A process was started with these variables; said once or more."""
        self.give_back(process)
        self._taken[process] = variables.get(VISIBLE, "").split(",") if variables else []
        self._jobs.update(self._taken[process])

    def give_back(self, process: int) -> None:
        """It has ended; once or more."""
        self._jobs.subtract(self._taken.pop(process, []))
