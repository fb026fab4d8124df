"""A Ray of this machine that ends with the process that asked for it, however that one ends.

A process of its own keeps it: no signal to a terminal or a process group reaches Ray's, and when the pipe from the one
who asked closes, kill -9 included, jobs save and end before Ray does.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

from btx.errors import SystemFailed
from btx.run_folder.status import last_line
from btx.run_folder.threads import processors

OBJECT_STORE_BYTES = 100 * 2**20
"""Memory for objects that Ray's tasks share: btx has none, and Ray would take a third of all."""
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # one machine alone: it listens on the loopback interface
    "RAY_AUTH_MODE": "token",  # Ray 2.52 and later: lets in who has the token
}


class OwnRay:
    """A Ray of this process; `address` is its job server's."""

    def __init__(self, log: Path) -> None:
        """Start it; takes some seconds.

        Raises:
            SystemFailed: it does not start.
        """
        os.environ.update(VARIABLES)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as errors:
            self._keeper = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import keep; keep()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
            )  # fmt: skip
        assert self._keeper.stdout is not None
        self.address = self._keeper.stdout.readline().decode().strip()
        if not self.address:
            raise SystemFailed(f"Ray does not start on this machine: {last_line(log.read_text('utf-8', 'replace'))}; "
                               f"its log is {log}")  # fmt: skip

    def end(self) -> None:
        """Let jobs save, and end it."""
        self._keeper.communicate()


def keep() -> None:
    """Start Ray, print the address of its job server, and end all when standard input is closed."""
    import ray
    from ray.job_submission import JobSubmissionClient

    started = ray.init(
        address="local", num_cpus=processors(), object_store_memory=OBJECT_STORE_BYTES, include_dashboard=True,
        dashboard_host="127.0.0.1", log_to_driver=False, logging_level=logging.ERROR,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    address = f"http://{started.dashboard_url}"
    print(address, flush=True)
    sys.stdin.buffer.read()
    client = JobSubmissionClient(address)
    jobs = [job.submission_id for job in client.list_jobs() if job.submission_id]
    while left := [job for job in jobs if not client.get_job_status(job).is_terminal()]:
        for job in left:
            client.stop_job(job)
        time.sleep(0.5)
    ray.shutdown()
