"""This process as one of several that train a model together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from btx.models.device import choose_device
from btx.models.sharding import largest
from btx.process import Interrupts, local_rank
from btx.training.loop import stop_if_asked

PATIENCE = timedelta(hours=1)
"""How long processes wait for each other: while the first one reads or hashes large files, for example."""


@contextmanager
def joined(device: str, interrupts: Interrupts, message: str) -> Iterator[None]:
    """Within, the processes that torchrun has started are one group, each with a GPU of its own where there are any; at
    the end all of them stop if a signal came to one.

    Args:
        device: as the recipe has it.

    Raises:
        Interrupted: with `message`.
    """
    kind = choose_device(device).type
    if kind == "cuda":
        torch.cuda.set_device(local_rank())
    # Values that Python decides by go from host to host: no process waits for its GPU to know them.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    yield
    stop_if_asked(interrupts, largest(interrupts.pending or 0), message)
    distributed.destroy_process_group()
