"""A Slurm cluster of this host's own: several "nodes" that are daemons beside each other, in one folder, on free ports.

Debian: apt install slurm-wlm munge. No systemd, cgroups, database or root needed. By hand, with a run folder that jobs
can be submitted for until Ctrl-C:  python -m tests.slurm_cluster FOLDER
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from getpass import getuser
from pathlib import Path
from typing import Any

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
STARTING_S = 30.0

CONF = """\
ClusterName=btxtest
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
MpiDefault=none
MailProg=/bin/true
JobRequeue=1
KillWait=10
MinJobAge=60
"""
NODE = (
    "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN\n"
)
PARTITIONS = """\
PartitionName=spot Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE Nodes={nodes}
PartitionName=urgent PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE Nodes={nodes}
"""


def why_not() -> str | None:
    """Why no cluster can be started here; None if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"Slurm is not installed ({', '.join(missing)} missing): apt install slurm-wlm munge" if missing else None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass
class Cluster:
    """Nodes n1, n2, ... with partitions `spot`, whose jobs give way to those of `urgent` and are requeued."""

    folder: Path
    nodes: list[str]
    host: str
    environment: dict[str, str]
    """What makes Slurm's programs talk to this cluster."""
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """munged, slurmctld, n1, n2, ..."""

    def start(self) -> None:
        """Start all daemons and wait for the nodes.

        Raises:
            RuntimeError: they do not come up; the message holds the ends of their logs.
        """
        munge = self.folder / "munge"
        self._start("munged", "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
                    f"--key-file={munge}/munge.key", f"--pid-file={munge}/munged.pid", f"--seed-file={munge}/seed",
                    f"--log-file={munge}/munged.log")  # fmt: skip
        _until((self.folder / "munge.socket").exists, "munged")
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        try:
            self.await_idle()
        except RuntimeError as error:
            logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))
            raise RuntimeError(f"{error}\n{logs}") from error

    def start_controller(self) -> None:
        """Start slurmctld, with the jobs it knew."""
        self._start("slurmctld", "slurmctld", "-D")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill(self, daemon: str) -> None:
        """End a daemon with kill -9; a `slurmd`'s jobs stay, as orphans."""
        self.daemons[daemon].kill()
        self.daemons.pop(daemon).wait()

    def lose(self, node: str) -> None:
        """End a node as if its machine were gone: its daemon and all of its jobs' processes with kill -9, before any of
        them can tell of another's end."""
        import psutil

        gone = [psutil.Process(self.daemons[node].pid)]
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == node:
                    gone += [process, *(parent for parent in process.parents() if parent.name() == "slurmstepd")]
        for act in ("suspend", "kill"):
            for process in set(gone):
                with contextlib.suppress(psutil.NoSuchProcess):
                    getattr(process, act)()
        self.daemons.pop(node).wait()

    def await_idle(self) -> None:
        """Wait until all nodes are there and have nothing to do."""
        _until(lambda: self.ask("sinfo", "-h", "-p", "spot", "-t", "idle", "-o", "%D") == str(len(self.nodes)), "nodes")

    def _processes(self) -> Iterator[Any]:
        """Those of its jobs' steps: psutil's."""
        import psutil

        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if "SLURM_JOB_ID" in environment and environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    yield process

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as output:
            self.daemons[name] = subprocess.Popen(  # it ends with this process, however that ends
                ("setpriv", "--pdeathsig", "KILL", *command), env=os.environ | self.environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def ask(self, *command: str) -> str:
        """What one of Slurm's programs prints; an empty text if it fails."""
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    def empty(self) -> None:
        """End all jobs, those that wait first."""
        self.ask("scancel", "--state=PENDING", f"--user={getuser()}")
        self.ask("scancel", "--signal=KILL", "--full", f"--user={getuser()}")
        self.ask("scancel", f"--user={getuser()}")
        ends = time.monotonic() + STARTING_S
        while self.ask("squeue", "-h") and time.monotonic() < ends:
            time.sleep(0.2)

    def stop(self) -> None:
        """End all jobs and daemons, and whatever they have started."""
        self.empty()
        for name in reversed(list(self.daemons)):
            daemon = self.daemons.pop(name)
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self._processes():  # of daemons that were killed
            process.kill()


@contextlib.contextmanager
def slurm_cluster(folder: Path, nodes: int = 2, cpus: int = 2, grace_s: int = 10) -> Iterator[Cluster]:
    """A running cluster, gone at the block's end.

    Args:
        folder: for its files; the path must be short (a Unix socket's has 107 bytes at most).
        nodes: how many; each has `cpus` processors, whatever this host has.
        grace_s: what a job of `spot` that has to give way is given to save.
    """
    host = socket.gethostname().partition(".")[0]
    names = [f"n{number}" for number in range(1, nodes + 1)]
    for name in ("munge", "state", *(f"spool/{node}" for node in names)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "munge").chmod(0o700)
    key = folder / "munge" / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    control, *ports = _free_ports(1 + nodes)
    conf = CONF.format(host=host, user=getuser(), folder=folder, port=control)
    for node, port in zip(names, ports, strict=True):
        conf += NODE.format(node=node, host=host, port=port, cpus=cpus)
    (folder / "slurm.conf").write_text(conf + PARTITIONS.format(nodes=",".join(names), grace=grace_s))
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    cluster = Cluster(folder, names, host, environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _until(holds: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + STARTING_S
    while not holds():
        if time.monotonic() > ends:
            raise RuntimeError(f"{what} did not come up in {STARTING_S:.0f} s")
        time.sleep(0.1)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), slurm_cluster(Path(sys.argv[1]).absolute()) as running:
        print(f"export SLURM_CONF={running.environment['SLURM_CONF']}", flush=True)
        signal.pause()
