"""A Ray cluster of several nodes on this machine, in a network of its own: nothing else can reach it, and it takes no
port from anybody.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

ADDRESS = "http://127.0.0.1:8265"
VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
START_S = 120.0


def missing() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if find_spec("ray") is None:
        return "ray is not installed: pip install 'ray[default]'"
    if shutil.which("unshare") is None or subprocess.run([*NETWORK, "true"], capture_output=True).returncode:
        return "no network of its own can be made here: needs unshare and root"
    return None


NETWORK = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""Runs a command in a network that has a loopback interface alone."""


class RayCluster:
    """Nodes with some CPUs each; the first is the head, which has the job server."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.network = subprocess.Popen([*NETWORK, "sleep", "86400"])
        self.nodes: list[subprocess.Popen[bytes]] = []

    def command(self, *command: str) -> list[str]:
        """A command as it is run in the cluster's network."""
        return ["nsenter", f"--net=/proc/{self.network.pid}/ns/net", *command]

    def add_node(self, *, cpus: int) -> subprocess.Popen[bytes]:
        """Start a node; it is there when this returns. Its process has all others of the node below it."""
        options = ["--node-ip-address", "127.0.0.1", "--num-cpus", str(cpus), "--disable-usage-stats", "--block",
                   "--object-store-memory", str(100 * 2**20)]  # fmt: skip
        if not self.nodes:
            options += ["--head", "--port", "6379", "--temp-dir", str(self.folder), "--dashboard-host", "127.0.0.1"]
        else:
            options += ["--address", "127.0.0.1:6379"]
        with open(self.log, "ab") as log:
            node = subprocess.Popen(
                self.command("setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "ray.scripts.scripts", "start",
                             *options), stdout=log, stderr=log, start_new_session=True, env=os.environ | VARIABLES,
            )  # fmt: skip
        self.nodes.append(node)
        since = time.monotonic()
        while self.log.read_text("utf-8", "replace").count("Ray runtime started") < len(self.nodes):
            assert node.poll() is None, self.log.read_text()
            assert time.monotonic() - since < START_S, self.log.read_text()
            time.sleep(0.1)
        return node

    def kill_node(self, node: subprocess.Popen[bytes]) -> None:
        """A node dies as if its machine lost power: with everything that ran on it."""
        self.nodes.remove(node)
        for process in (*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        node.wait()

    def close(self) -> None:
        """End all nodes."""
        for node in reversed(self.nodes):
            self.kill_node(node)
        self.network.kill()
        self.network.wait()


@contextlib.contextmanager
def ray_cluster(log: Path, cpus: Sequence[int] = (1, 1)) -> Iterator[RayCluster]:
    """A cluster of nodes with so many CPUs each; the test is skipped, with the reason, where there can be none."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: Ray's sockets lie in it
    cluster = RayCluster(folder, log)
    try:
        for count in cpus:
            cluster.add_node(cpus=count)
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)
