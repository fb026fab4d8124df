"""Jobs as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from btx.errors import UserError
from btx.process import SAVE_AND_END
from btx.recipe.launch import Launch
from btx.running.gpus import VISIBLE, Gpus, gpus_of
from btx.running.launchers.job import VARIABLES, Handle, Standing, btx_command, refuse_several_nodes


class LocalLauncher:
    """Starts each job at once, in a process of its own session: so Ctrl-C reaches `btx run` alone, which then ends its
    jobs in order. Each that trains sees GPUs of its own, as many as it has processes; the others see all.
    """

    takes_waiting = False
    goes_on = False

    def __init__(self, launch: Launch, device: str) -> None:
        self._launch, self._device = launch, device
        self._started: dict[int, LocalProcess] = {}

    def check(self, run: Path, jobs: Sequence[Sequence[str]]) -> None:
        """Refuse models that several machines train."""
        refuse_several_nodes(self._launch, jobs, "launch.kind: local has this machine alone")

    def submit(self, run: Path, stages: Sequence[str], log: Path, *, after: Sequence[Handle] = ()) -> Handle:
        own = self._launch.gpus_of(stages)
        variables = self._gpus.variables(own) if own else {}
        started = self.start(run, stages, log, variables)
        self._started[started.pid] = started
        self._gpus.take(started.pid, variables)
        handle = {"pid": started.pid, "born": _born(started.pid), "node": platform.node()}
        return handle | ({"gpus": variables[VISIBLE]} if variables else {})

    @cached_property
    def _gpus(self) -> Gpus:
        return Gpus(gpus_of(self._device))

    def start(self, run: Path, stages: Sequence[str], log: Path, variables: Mapping[str, str]) -> LocalProcess:
        return start(["work", str(run), *stages], log, variables)

    def poll(self, handles: Sequence[Handle]) -> list[Standing]:
        """How processes stand; only of those that this launcher has started the exit code is known."""
        return [self._poll(handle) for handle in handles]

    def _poll(self, handle: Handle) -> Standing:
        if (started := self._started.get(handle["pid"])) is None:
            return Standing("running" if self._lives(handle) else "ended")
        exit_code = started.exit_code()
        if exit_code is not None:
            self._gpus.give_back(started.pid)
        return Standing("running" if exit_code is None else "ended", exit_code)

    def _lives(self, handle: Handle) -> bool:
        """Whether a process that an earlier `btx run` has left is still there; its GPUs are not free until it ends."""
        lives = _lives(handle)
        if lives and "gpus" in handle:
            self._gpus.take(handle["pid"], {VISIBLE: handle["gpus"]})
        elif not lives and "gpus" in handle:
            self._gpus.give_back(handle["pid"])
        return lives

    def cancel(self, handle: Handle) -> None:
        if handle["pid"] in self._started:
            self._started[handle["pid"]].terminate()
        elif handle["node"] != platform.node():
            raise UserError(f"a process of {handle['node']}; ask it there")
        elif _lives(handle):
            with contextlib.suppress(ProcessLookupError):
                os.kill(handle["pid"], SAVE_AND_END)

    def kill(self, handle: Handle) -> None:
        """End a process that this launcher has started, and those of its session."""
        if handle["pid"] in self._started:
            self._started[handle["pid"]].kill()


def _born(pid: int) -> float:
    """When a process began: with its number it is known for certain. 0.0 if it has ended already."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def _lives(handle: Handle) -> bool:
    """Whether a process of this machine is still there. `btx run` is alone in its run folder, so jobs that one on
    another machine has left are ending or gone."""
    return bool(handle["node"] == platform.node() and handle["born"] and _born(handle["pid"]) == handle["born"])


@dataclass(frozen=True)
class LocalProcess:
    """A started process and its log."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def terminate(self) -> None:
        """Ask it to save and end."""
        if self.exit_code() is None:
            self.process.send_signal(SAVE_AND_END)

    def kill(self) -> None:
        """End it, and what it has started."""
        if self.exit_code() is None:
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        self.process.wait()


def start_run(run: Path, log: Path, variables: Mapping[str, str]) -> LocalProcess:
    """Start everything that is left of a run folder in a process of its own, as `btx run` does it; its output goes to
    `log`."""
    return start(["run-of-sweep", str(run)], log, variables)


def start(arguments: Sequence[str], log: Path, variables: Mapping[str, str] = {}) -> LocalProcess:
    """Start a command of btx in a process and session of its own; its output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [*btx_command(), *arguments]
    environment = {**os.environ, **VARIABLES, **variables}
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    return LocalProcess(process, log)
