"""Processes of their own in a moment: forked from one that has imported what takes seconds."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from btx.process import SAVE_AND_END
from btx.running.launchers import START
from btx.running.launchers.local import LocalLauncher

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, SAVE_AND_END)
"""Those that btx listens to."""
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([
    "torch.distributed.fsdp", "transformers.generation.utils", "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral", "btx.cli.main", "btx.stages.train", "btx.stages.finetune",
])  # fmt: skip


def start(target: Callable[..., Any], *arguments: Any, log: Path) -> BaseProcess:
    """Start `target` in a process of its own; what it prints goes to `log`."""
    process = FORKED.Process(target=_logged, args=(target, arguments, log))
    process.start()
    return process


def start_btx(*arguments: str | Path, log: Path) -> BaseProcess:
    """Start a command of btx."""
    return start(btx, *map(str, arguments), log=log)


def btx(*arguments: str) -> None:
    """The command line, in this process."""
    from btx.cli.main import main

    sys.argv = ["btx", *arguments]
    main()


def btx_with_quick_ranks(*arguments: str) -> None:
    """The command line, in a process that was forked here; processes it starts itself are forked from the same one."""
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    btx(*arguments)


def run_with_forked_jobs(*arguments: str) -> None:
    """`btx run` whose jobs are forked from its own process, and are its children."""

    class ChildLauncher(ForkedLauncher):
        def forked(self, run: Path, stages: Sequence[str], log: Path) -> BaseProcess:
            job = multiprocessing.get_context("fork").Process(
                target=_as_if_new, args=(btx, ("work", str(run), *stages), log)
            )  # fmt: skip
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            job.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return job

    START["local"] = ChildLauncher
    btx("run", *arguments)


@dataclass(frozen=True)
class ForkedJob:
    """As a `LocalProcess`."""

    process: BaseProcess

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def exit_code(self) -> int | None:
        return self.process.exitcode

    def terminate(self) -> None:
        if self.process.is_alive():
            os.kill(self.pid, SAVE_AND_END)

    def kill(self) -> None:
        self.process.kill()


class ForkedLauncher(LocalLauncher):
    """Starts stages as the local launcher does, sooner: in processes forked from one that has imported all."""

    def start(  # type: ignore[override]
        self, run: Path, stages: Sequence[str], log: Path, variables: Mapping[str, str]
    ) -> ForkedJob:
        log.parent.mkdir(parents=True, exist_ok=True)
        return ForkedJob(self.forked(run, stages, log))

    def forked(self, run: Path, stages: Sequence[str], log: Path) -> BaseProcess:
        return start_btx("work", run, *stages, log=log)


@contextlib.contextmanager
def quick_jobs() -> Iterator[None]:
    """Jobs of this process's runs are such processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(START, "local", ForkedLauncher)
        yield


def btx_here(*arguments: str | Path, cwd: Path) -> tuple[int, str, str]:
    """A command of btx in this process, its jobs in processes of their own: exit code and what it printed."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.MonkeyPatch.context() as patch, quick_jobs():
        patch.chdir(cwd)
        patch.setattr(sys, "argv", sys.argv)
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            try:
                btx(*map(str, arguments))
            except SystemExit as ended:
                code = int(ended.code or 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    out, err = (stream.buffer.getvalue().decode() for stream in streams)  # type: ignore[attr-defined]
    return code, out, err


def run_ranks(target: Callable[[int, str], None], folder: Path, count: int = 2) -> None:
    """Run target(rank, folder) in several processes at once, until all have ended."""
    from torch.multiprocessing import start_processes

    start_processes(target, (str(folder),), count, start_method=FORKED.get_start_method())


def _as_if_new(target: Callable[..., Any], arguments: tuple[Any, ...], log: Path) -> None:
    """With no handlers of the process it was forked from, which would swallow a signal that comes before its own."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _logged(target, arguments, log)


def _logged(target: Callable[..., Any], arguments: tuple[Any, ...], log: Path) -> None:
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    target(*arguments)
