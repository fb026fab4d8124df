"""Jobs as processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LocalJob:
    """A started process and its log."""

    process: subprocess.Popen[bytes]
    log: Path

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def terminate(self) -> None:
        """Ask it to save and end."""
        if self.exit_code() is None:
            self.process.send_signal(signal.SIGTERM)


def start_local(run: Path, stages: Sequence[str], log: Path) -> LocalJob:
    """Start `stages` of the run folder in a process of their own; its output goes to `log`.

    The process gets a session of its own, so that Ctrl-C reaches `btx run` alone, which then ends its jobs in order.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "btx", "work", str(run), *stages]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "true"}
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    return LocalJob(process, log)
