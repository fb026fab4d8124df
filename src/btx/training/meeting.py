"""Where the machines that train one model meet (torchrun's rendezvous). Plain Python.

`btx work` runs once on each of them and learns from its environment where the others are:

- under Slurm (`srun --ntasks-per-node=1 btx work RUN STAGE`) from the variables that srun sets;
- elsewhere from BTX_HEAD=HOST[:PORT], the first machine and a port that is free there, the same on all machines, and
  BTX_NODE=N, the number of this machine from 0 on, 0 being the first.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, field
from typing import Any

from btx.errors import UserError

PORT = 29400
"""torchrun's own."""


@dataclass(frozen=True)
class Meeting:
    """What torchrun's launcher is told."""

    name: str
    """The same for all machines."""
    endpoint: str
    own_address: str | None = None
    """None: as the machine knows itself."""
    options: dict[str, Any] = field(default_factory=dict)


def node_number() -> int:
    """Number of this machine among those of the job; 0 if it is alone.

    Raises:
        UserError: BTX_NODE is no number.
    """
    if _head() is None:
        return 0
    number = os.environ.get("BTX_NODE") or os.environ.get("SLURM_NODEID") or "0"
    if not number.isdecimal():
        raise UserError(f"BTX_NODE={number}: the number of this machine among those of the job is a whole one: 0 on "
                        f"the first, which BTX_HEAD names, then 1, 2, ...")  # fmt: skip
    return int(number)


def meeting(stage: str, nodes: int) -> Meeting:
    """Where the processes of a stage meet.

    Raises:
        UserError: they are to be on several machines, and the environment says nothing of the others.
    """
    name = stage.replace("/", "-")
    if nodes == 1:
        return Meeting(name, "localhost:0", "localhost")
    here, head = os.environ.get("SLURM_NNODES"), _head()
    if head is None or ("BTX_HEAD" not in os.environ and here != str(nodes)):
        job = f"this job of Slurm's has {here}" if here else "nothing here says where the others are"
        raise UserError(
            f"launch.nodes: {stage} is trained on {nodes} machines, and {job}: start `srun --nodes={nodes} "
            f"--ntasks-per-node=1 btx work RUN {stage}`, or the same on each machine with BTX_HEAD=HOST:PORT of the "
            f"first and BTX_NODE=0, 1, ... (`btx run` with launch.kind: slurm does so)"
        )
    return Meeting(name, head, options={"is_host": node_number() == 0})


def _head() -> str | None:
    """Host and port of the first machine; None where nothing says that there are several."""
    if head := os.environ.get("BTX_HEAD"):
        return head if re.search(r":\d+$", head) else f"{head}:{PORT}"
    names = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not names or int(os.environ.get("SLURM_NNODES", "1")) == 1:
        return None
    host = first_host(names)
    try:
        socket.getaddrinfo(host, None)
    except OSError:  # a name that only Slurm knows; srun runs on the first machine
        host = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", host)
    return f"{host}:{20_000 + int(os.environ.get('SLURM_JOB_ID', '0')) % 10_000}"


def first_host(names: str) -> str:
    """The first of Slurm's host names: of `n[03-05,9],m1` it is n03."""
    matched = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^,]*))?", names)
    assert matched is not None
    return "".join(part or "" for part in matched.groups())
