"""Jobs as processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx.process import SAVE_AND_END


@dataclass(frozen=True)
class LocalJob:
    """A started process and its log."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def handle(self) -> dict[str, Any]:
        """The process's number."""
        return {"pid": self.process.pid}

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def terminate(self) -> None:
        """Ask it to save and end."""
        if self.exit_code() is None:
            self.process.send_signal(SAVE_AND_END)

    def wait(self) -> None:
        """Wait until it has ended."""
        self.process.wait()


def start_local(run: Path, stages: Sequence[str], log: Path) -> LocalJob:
    """Start `stages` of the run folder in a process of their own; its output goes to `log`.

    The process gets a session of its own, so that Ctrl-C reaches `btx run` alone, which then ends its jobs in order.
    """
    return _start(["work", str(run), *stages], log, {"TOKENIZERS_PARALLELISM": "true"})


def start_run(run: Path, log: Path, *, threads: int | None = None) -> LocalJob:
    """Start everything that is left of a run folder in a process of its own, as `btx run` does it; see `start_local`.

    Args:
        threads: CPU threads of stages that run alone; None: all processors.
    """
    return _start(["run-of-sweep", str(run)], log, {} if threads is None else {"OMP_NUM_THREADS": str(threads)})


def _start(arguments: Sequence[str], log: Path, variables: dict[str, str]) -> LocalJob:
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "btx", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"} | variables
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    return LocalJob(process, log)
