"""Processes of their own in a moment: forked from one that has imported what takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class ForkedJob:
    """A job of `btx run` as such a process."""

    process: BaseProcess
    log: Path

    @property
    def handle(self) -> dict[str, Any]:
        """The process's number."""
        return {"pid": self.process.pid}

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.exitcode

    def terminate(self) -> None:
        """Ask it to save and end."""
        self.process.terminate()

    def wait(self) -> None:
        """Wait until it has ended."""
        self.process.join()


def start_forked(run: Path, stages: Sequence[str], log: Path) -> ForkedJob:
    """Start stages as the local launcher does, sooner."""
    log.parent.mkdir(parents=True, exist_ok=True)
    return ForkedJob(start_btx("work", run, *stages, log=log), log)


def run_ranks(target: Callable[[int, str], None], folder: Path) -> None:
    """Run target(rank, folder) in two processes at once, until both have ended."""
    from torch.multiprocessing import start_processes

    start_processes(target, (str(folder),), 2, start_method=FORKED.get_start_method())


def _logged(target: Callable[..., Any], arguments: tuple[Any, ...], log: Path) -> None:
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    target(*arguments)
