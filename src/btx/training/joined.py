"""This process as one of several that train a model together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from btx.models.device import choose_device
from btx.process import local_rank

PATIENCE = timedelta(hours=1)
"""How long processes wait for each other: while the first one reads or hashes large files, for example."""


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Within, the processes that torchrun has started are one group, each with a GPU of its own where there are any.
    Once in a process: what torchrun's store holds of a group would mislead a second one.

    Args:
        device: as the recipe has it.
    """
    kind = choose_device(device).type
    if kind == "cuda":
        torch.cuda.set_device(local_rank())
    # Values that Python decides by go from host to host: no process waits for its GPU to know them.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    yield
    distributed.destroy_process_group()
