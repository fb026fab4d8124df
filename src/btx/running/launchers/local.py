"""Jobs as processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from btx.process import SAVE_AND_END
from btx.recipe.launch import Launch
from btx.running.launchers.job import Handle


class LocalLauncher:
    """Starts each job at once, in a process of its own session: so Ctrl-C reaches `btx run` alone, which then ends its
    jobs in order."""

    takes_waiting = False

    def __init__(self, launch: Launch) -> None:
        self._started: dict[int, LocalProcess] = {}

    def submit(self, run: Path, stages: Sequence[str], log: Path, *, after: Sequence[Handle] = ()) -> Handle:
        """Start the job."""
        started = start(["work", str(run), *stages], log, {"TOKENIZERS_PARALLELISM": "true"})
        self._started[started.process.pid] = started
        return {"pid": started.process.pid}

    def poll(self, handle: Handle) -> int | None:
        """Exit code of a process that this launcher has started; None while it runs."""
        return self._started[handle["pid"]].exit_code()

    def cancel(self, handle: Handle) -> None:
        """Ask a process that this launcher has started to save and end."""
        self._started[handle["pid"]].terminate()

    def kill(self, handle: Handle) -> None:
        """End a process that this launcher has started, and those of its session."""
        if self.poll(handle) is None:
            os.killpg(handle["pid"], signal.SIGKILL)


@dataclass(frozen=True)
class LocalProcess:
    """A started process and its log."""

    process: subprocess.Popen[bytes]
    log: Path

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


def start_run(run: Path, log: Path, *, threads: int | None = None) -> LocalProcess:
    """Start everything that is left of a run folder in a process of its own, as `btx run` does it.

    Args:
        log: its output goes there.
        threads: CPU threads of stages that run alone; None: all processors.
    """
    return start(["run-of-sweep", str(run)], log, {} if threads is None else {"OMP_NUM_THREADS": str(threads)})


def start(arguments: Sequence[str], log: Path, variables: dict[str, str]) -> LocalProcess:
    """Start a command of btx in a process and session of its own; its output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "btx", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"} | variables
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    return LocalProcess(process, log)
