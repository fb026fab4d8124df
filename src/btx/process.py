"""A process of btx: Ctrl-C, SIGTERM and SIGHUP let it finish the step, save and leave a resumable run. Plain Python."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from btx.errors import BtxError

Log = Callable[[str], None]
"""Takes a line for the user."""
FOR_THE_USER = "· "
"""How such a line begins in a job's output: what else stands there is libraries' and errors'."""


_progress = 0


def note_progress() -> None:
    """Work has come further: a step, a batch, a document, a block of a file. Who only waits does not call it."""
    global _progress
    _progress += 1


def tell(line: str) -> None:
    """Print a line for the user; `btx run` shows what its jobs tell."""
    note_progress()
    print(f"{FOR_THE_USER}{line}", flush=True)


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


READER_GONE = 141
"""Exit code of a job whose output nobody reads any more, as the shell tells SIGPIPE; it ends without a word."""
SAVE_AND_END = signal.SIGUSR1
"""What btx itself sends to the processes it has started. It is another signal than the one that a whole group may get
from outside, so that both together are no second request."""
SAME_EVENT_S = 1.0
"""Seconds in which a second signal is the first one again: it came to the group and to the process."""


class Interrupts:
    """Remembers the first Ctrl-C, SIGTERM or SIGHUP; a second one, more than a second later, ends the process at once,
    or, where a person types into this very process (a notebook, Python's prompt), what it is doing.

    A signal that is ignored when the process starts, as `nohup` does it with SIGHUP, stays ignored. As a context
    manager it listens inside the block.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._since = 0.0
        self._at_once: str | None = None
        self._before: dict[int, Any] = {}

    def listen(self) -> Interrupts:
        """Install the handlers; in another thread than the main one there are none, and no signal is asked for."""
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, SAVE_AND_END):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before.setdefault(number, signal.signal(number, self._note))
        return self

    def unlisten(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def __enter__(self) -> Interrupts:
        return self.listen()

    def __exit__(self, *error: object) -> None:
        self.unlisten()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now, asked = time.monotonic(), number == SAVE_AND_END
        if self.pending is not None:
            if not asked and now - self._since > SAME_EVENT_S:
                if hasattr(sys, "ps1"):  # the prompt's, IPython's and Jupyter's too
                    raise KeyboardInterrupt
                os._exit(128 + number)
            return
        self.pending, self._since = signal.SIGTERM if asked else number, now
        if self._at_once is not None:
            self.raise_if_pending(self._at_once)

    def tell(self, line: str) -> None:
        """Print a line for the user, as `tell`; where nobody reads any more (`| head`, a closed terminal), it is as if
        a signal came."""
        try:
            tell(line)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            say_no_more()
            self._note(READER_GONE - 128, None)

    @contextlib.contextmanager
    def at_once(self, message: str = "stopped; run it again to continue") -> Iterator[None]:
        """Inside the block a signal raises `Interrupted` where the work stands, for work that loses nothing by it."""
        previous, self._at_once = self._at_once, message
        try:
            if self.pending is not None:
                self.raise_if_pending(message)
            yield
        finally:
            self._at_once = previous

    def raise_if_pending(self, message: str) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.pending is not None:
            raise Interrupted(message, self.pending)


@contextlib.contextmanager
def ending_at_once(message: str) -> Iterator[None]:
    """Raise `Interrupted` from the block at the first signal, so that it cleans up."""
    with Interrupts() as interrupts, interrupts.at_once(message):
        yield


GRACE_S = 60.0
"""Seconds that work which hangs is given to save and end."""
LOOK_S = 1.0
ERRORS = 2
"""The descriptor of standard error: what holds a Python stream's lock may be what hangs."""


@contextlib.contextmanager
def ending_if_hung(after_s: float | None, note: Callable[[str], None]) -> Iterator[None]:
    """Inside the block, end this process if its work comes no further (`note_progress`).

    After `after_s` seconds without progress it prints where each of its threads stands and is asked to save and end;
    `GRACE_S` later it ends all the same, with exit code 1. A thread watches, so it needs the interpreter to run: a
    process that is stopped as a whole is for whoever started it to notice (`btx.running.under_way`).

    Args:
        after_s: None watches nothing.
        note: called with a line that says so.
    """
    if after_s is None:
        yield
        return

    def ask(line: str) -> None:
        faulthandler.dump_traceback(file=ERRORS)
        os.write(ERRORS, f"{line}: asked to save and end\n".encode())
        note(line)
        os.kill(os.getpid(), SAVE_AND_END)

    def end(line: str) -> None:
        os.write(ERRORS, f"{line}: ended where it stood\n".encode())
        os._exit(1)

    with at_standstill(after_s, ask), at_standstill(after_s + GRACE_S, end):
        yield


@contextlib.contextmanager
def at_standstill(
    after_s: float, act: Callable[[str], None], over: Callable[[], None] = lambda: None
) -> Iterator[None]:  # fmt: skip
    """Inside the block, call `act`, in a thread and with a line that says so, when this process's work has come no
    further for `after_s` seconds, and `over` if it goes on after all. Only time in which the process runs counts, by a
    clock that nobody can set."""
    ended = threading.Event()

    def watch() -> None:
        look_s = min(LOOK_S, after_s / 10)
        seen, still_s, before, stands = _progress, 0.0, time.monotonic(), False
        while not ended.wait(look_s):
            now = time.monotonic()
            # Of a long pause only a little counts: then this process, and not its work, was stopped.
            seen, still_s, before = _progress, (still_s + min(now - before, 3 * look_s)) * (seen == _progress), now
            if stands and still_s < after_s:
                stands = False
                over()
            elif not stands and still_s >= after_s:
                stands = True
                act(f"no progress for {still_s:.0f} s, which launch.hung_after_s takes for a hang")

    threading.Thread(target=watch, name="watches progress", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def rank() -> int:
    """Number of this process among those that work on one model together, as torchrun tells it; 0 if it is alone."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes work on one model together: torchrun says so in their environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def processes_here() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def say_no_more() -> None:
    """Let what is still printed go nowhere: its reader has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def wait_for_threads_briefly() -> None:
    """Let threads that wait for each other sleep after microseconds, not a time slice, unless the environment says
    otherwise. To be called before torch is loaded, whose GNU OpenMP reads it then.

    Beside one other busy process on two processors, the demo's seed model trains at 155 tokens/s without this and at
    5,300 with it; on an idle machine it costs up to 8 %
    (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def end_with_parent() -> None:
    """Ask this process to save and end when its parent is gone, so that a killed run leaves no jobs behind. Where
    multiprocessing has started it, that is the process that asked for it, which may not be the system's parent.

    Watching from a thread works on every system; Linux alone could ask the kernel.
    """
    parent, starter = os.getppid(), multiprocessing.parent_process()

    def watch() -> None:
        while os.getppid() == parent and (starter is None or starter.is_alive()):
            time.sleep(0.5)
        os.kill(os.getpid(), SAVE_AND_END)

    threading.Thread(target=watch, daemon=True).start()
