"""A process of btx: Ctrl-C and SIGTERM let it finish the step, save and leave a resumable run. Plain Python."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from btx.errors import BtxError

Log = Callable[[str], None]
"""Takes a line for the user."""
TOLD = "· "
"""How such a line begins in a job's output: what else stands there is libraries' and errors'."""


def tell(line: str) -> None:
    """Print a line for the user; `btx run` shows what its jobs tell."""
    print(f"{TOLD}{line}", flush=True)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import without looking for garbage: torch and transformers make millions of objects, and all of them stay. Takes
    a sixth off the time (LOG.md)."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Interrupted(BtxError):
    """A signal came and everything was saved; the exit code is 128 + its number, as shells expect."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Interrupts:
    """Remembers the first SIGINT or SIGTERM; a second one ends the process at once."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._immediate = False
        self._before: dict[int, Any] = {}

    def listen(self) -> Interrupts:
        """Install the handlers (main thread only)."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def unlisten(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending is not None:
            os._exit(128 + number)
        self.pending = number
        if self._immediate:
            self.raise_if_pending("stopped; run it again to continue")

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block a signal raises `Interrupted` where the work stands, for work that loses nothing by it."""
        previous = self._immediate
        self._immediate = True
        try:
            self.raise_if_pending("stopped; run it again to continue")
            yield
        finally:
            self._immediate = previous

    def raise_if_pending(self, message: str) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.pending is not None:
            raise Interrupted(message, self.pending)


@contextlib.contextmanager
def ending_at_once(message: str) -> Iterator[None]:
    """Raise `Interrupted` from the block at the first SIGINT or SIGTERM, so that it cleans up (main thread only)."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(message, number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Send SIGTERM to this process when its parent is gone, so that a killed run leaves no jobs behind.

    Watching from a thread works on every system; Linux alone could ask the kernel.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
