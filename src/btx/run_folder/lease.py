"""Who is at work in a run folder, told by what works on every file system: a file that its owner touches again and
again. Plain Python.

A lock of the operating system (flock) is the surest, but on a network file system it may not be there, or hold on one
machine only. So whoever holds the lock also keeps `.locks/NAME.lease`, made with O_EXCL, touched every `BEAT_S` by a
thread. Who finds one watches it: it is its owner's as long as it changes. After `LEASE_S` without a change, measured by
the watcher's own clock that nobody can set, it may be taken over; at once if its owner was a process of this machine
that is gone. Two machines' clocks are never compared. Source: `filelock.SoftFileLease`, which does all this.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import filelock

LEASE_S = 60.0
"""Seconds without a sign of life after which work is taken from its owner. The same in all processes."""
BEAT_S = 10.0
"""Seconds between two signs of life."""
LOOK_S = 0.1


def take_lease(file: Path, patience_s: float) -> filelock.SoftFileLease:
    """Make `file` this process's until it is released. An owner that shows no sign of life is waited for until it is
    taken for dead.

    Args:
        patience_s: seconds to wait for an owner that lives.

    Raises:
        filelock.Timeout: the owner lives.
    """
    lease = filelock.SoftFileLease(
        file, lease_duration=LEASE_S, heartbeat_interval=BEAT_S, on_compromise=_end, is_singleton=False
    )
    at_first, started = sign_of_life(file), time.monotonic()
    while True:
        try:
            lease.acquire(timeout=0)
            return lease
        except filelock.Timeout:
            waited, now = time.monotonic() - started, sign_of_life(file)
            if waited > LEASE_S and now == at_first is not None:
                _fill_if_empty(file, at_first[0])
            if waited >= patience_s and (now != at_first or waited > LEASE_S + 2 * BEAT_S):
                raise
        time.sleep(LOOK_S)


def lock_file(run: Path, work: str, kind: str) -> Path:
    """What a run folder says of some work: who is at it (`lock`, `lease`, `pid`), how it failed (`failed.json`)."""
    return run / ".locks" / f"{work.replace('/', '-')}.{kind}"


def is_alive(file: Path) -> bool:
    """Whether the owner of a lease has touched it lately, by the clock of the file system both are on."""
    try:
        beat = file.stat().st_mtime
        with tempfile.TemporaryFile(dir=file.parent) as probe:
            now = os.fstat(probe.fileno()).st_mtime
    except FileNotFoundError:
        return False
    except OSError:  # the folder can only be read
        now = time.time()
    return abs(now - beat) < LEASE_S  # what was touched in the future was touched before the clock was set back


def sign_of_life(lease: Path) -> tuple[int, int] | None:
    """What changes when an owner touches its lease, or another takes it; None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        status = lease.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _fill_if_empty(file: Path, inode: int) -> None:
    """Make a stump one that can be taken over: a process killed between making its lease and writing its name into it
    leaves an empty file, which filelock takes for an old version's."""
    with contextlib.suppress(OSError), open(file, "r+b") as opened:
        status = os.fstat(opened.fileno())
        if status.st_ino == inode and not status.st_size:
            opened.write(b"of a process that was killed")


def _end(lost: filelock.LeaseCompromise) -> None:
    """End this process, in the lease's thread: another one has its work now, or will have. All it has finished stays,
    and what it was writing counts for nothing."""
    print(
        f"error: {lost.lock_file}: this process gave no sign of life for so long that another may have taken over its "
        f"work, or somebody removed the file ({lost.reason}). It ends at once; finished stages and checkpoints stay",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)
