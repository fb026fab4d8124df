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
"""How long processes wait for each other, at least: while the first one reads or hashes large files, for example."""


@contextmanager
def joined(device: str, hung_after_s: float | None) -> Iterator[None]:
    """Within, the processes that torchrun has started are one group, each with a GPU of its own where there are any.
    Once in a process: what torchrun's store holds of a group would mislead a second one.

    Args:
        device: as the recipe has it.
        hung_after_s: what the recipe takes for a hang. They wait longer: a hang is found out and told before one of
            them gives the others up.
    """
    kind = choose_device(device).type
    if kind == "cuda":
        torch.cuda.set_device(local_rank())
    # Values that Python decides by go from host to host: no process waits for its GPU to know them.
    patience = PATIENCE + timedelta(seconds=hung_after_s or 0)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=patience)
    yield
    distributed.destroy_process_group()
