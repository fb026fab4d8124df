"""Running programs that a model wrote: each in a process of its own, fenced in, killed when its time is up.

Always: a new Python (`-I -S -B`: no environment variables, no installed packages), an empty folder of its own that is
removed afterwards, a cleaned environment, hard limits of CPU seconds, address space, file size and open files, no
new processes or threads, a wall clock, and the whole process group killed at the end. Started by root the program runs
as `nobody`. Where Linux offers it: no network (a network namespace), no writing, removing or starting of anything
outside its folder (landlock), no shared memory that outlives it and no namespaces of its own (seccomp).
`check_code_execution` says which of these hold here; docs/evaluation-tasks.md says what remains open. This is a fence
against accidents of a model, not against an attacker. Plain Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from btx.errors import UserError
from btx.run_folder.threads import processors

NOBODY = 65534
PROBE = "import bisect, collections, heapq, itertools, math, random, re, string\nassert math.gcd(4, 6) == 2\n"
"""A program that has to pass before any other is run."""
REQUIRED = ("cpu", "file_size", "processes")
"""Fences without which nothing is run."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0
    """Wall seconds; a program that sleeps uses no CPU seconds."""
    cpu_s: int = 8
    memory_bytes: int = 1 << 30
    """Address space."""
    file_bytes: int = 1 << 20
    """Size of any file it writes."""
    open_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """It ran to its end without an error."""
    why: str
    """Empty if it passed; else its error, "time", or the signal that ended it."""


def run_program(program: str, limits: Limits = Limits()) -> Outcome:
    """Run a Python program; it passes if its last line is reached without an error.

    Leaving early, even with exit code 0, is not passing.
    """
    return _run(program, limits)[0]


def run_programs(programs: Sequence[str], limits: Limits = Limits()) -> list[Outcome]:
    """Run programs, one a processor at a time; outcomes in their order."""
    with ThreadPoolExecutor(processors()) as pool:
        return list(pool.map(lambda program: run_program(program, limits), programs))


@cache
def check_code_execution() -> dict[str, bool]:
    """Run a harmless program; which fences hold on this machine.

    Returns:
        {"network": no network, "writes": nothing outside its folder is written, "calls": nothing that outlives the
        program in the kernel's memory, no new namespaces, "cpu", "memory", "file_size",
        "open_files", "core", "processes": the limit is set}.

    Raises:
        UserError: programs cannot be run here, or a fence of `REQUIRED` cannot be put up.
    """
    outcome, fences = _run(PROBE, Limits())
    missing = [name for name in REQUIRED if not fences.get(name)]
    if not outcome.passed or missing:
        raise UserError(
            f"code execution: a test program did not run as it should on this machine "
            f"({outcome.why or 'no limit of ' + ', '.join(missing)}); the Python at {sys.base_prefix} must be readable "
            f"for the user it runs as{' (as root: nobody)' if _is_root() else ''}. Leave out the tasks that run code"
        )
    return fences


def fences_text(fences: dict[str, bool]) -> str:
    """One line for the user: what keeps programs in, and what does not."""
    said = {
        "network": ("no network", "NETWORK NOT CUT OFF"),
        "writes": ("no writing outside their folder", "WRITING OUTSIDE THEIR FOLDER NOT PREVENTED"),
        "memory": ("limited memory", "MEMORY NOT LIMITED"),
        "calls": ("nothing left in shared memory", "SHARED MEMORY THAT STAYS NOT PREVENTED"),
    }
    return "programs run with limited time, no new processes, " + ", ".join(
        there if fences.get(name) else missing for name, (there, missing) in said.items()
    )


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _all_may_read(folder: str) -> bool:
    """Whether every user gets at a folder: root's own Python often lies where others do not."""
    path = Path(folder).resolve()
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in (path, *path.parents))


def _run(program: str, limits: Limits) -> tuple[Outcome, dict[str, bool]]:
    if os.name != "posix":
        raise UserError("code execution needs Linux or macOS: this system has no resource limits for a process")
    token = secrets.token_hex(16)
    settings = {
        **asdict(limits), "token": token, "user": NOBODY if _is_root() else None,
        "read_all": not _all_may_read(sys.base_prefix),
    }  # fmt: skip
    with _empty_folder() as folder, tempfile.TemporaryFile() as report:
        Path(folder, "program.py").write_text(program, "utf-8", errors="replace")
        if _is_root():
            os.chown(folder, NOBODY, NOBODY)
        exit_code = _wait(folder, json.dumps(settings), report, limits.seconds)
        report.seek(0)
        return _outcome(report.read(limits.file_bytes), token, exit_code)


@contextlib.contextmanager
def _empty_folder() -> Iterator[str]:
    """A new folder; whatever a program has made of it, it goes, or as much of it as can."""
    folder = tempfile.mkdtemp(prefix="btx-code-")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            _remove(folder)


def _remove(folder: str) -> None:
    """Remove a folder of any depth. Folders in it are moved up to it before they are emptied: walking down would need a
    path, a call or an open file for every level."""
    Path(folder).chmod(0o700)
    top = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)

    def emptied(here: int) -> Iterator[str]:
        """Remove the files in a folder; its folders, opened up."""
        for entry in list(os.scandir(here)):
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.name, 0o700, dir_fd=here)
                yield entry.name
            else:
                os.unlink(entry.name, dir_fd=here)

    try:
        while below := list(emptied(top)):
            for name in below:
                inside = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=top)
                try:
                    for inner in emptied(inside):
                        os.rename(inner, secrets.token_hex(16), src_dir_fd=inside, dst_dir_fd=top)
                finally:
                    os.close(inside)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    Path(folder).rmdir()


def _wait(folder: str, settings: str, report: IO[bytes], seconds: float) -> int | None:
    """The process's exit code, or None when its time was up; nothing of it is left running."""
    jail = (Path(__file__).parent / "code_jail.py").read_text("utf-8")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", jail], cwd=folder, stdin=subprocess.PIPE, stdout=report,
        stderr=subprocess.DEVNULL, start_new_session=True,
        env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
    )  # fmt: skip
    try:
        process.communicate(settings.encode() + b"\n", timeout=seconds)
        return process.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _outcome(report: bytes, token: str, exit_code: int | None) -> tuple[Outcome, dict[str, bool]]:
    """What a report says; only one with the token was written by the fence and not by the program."""
    said: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(report)
    if isinstance(said, dict) and said.get("token") == token:
        return Outcome(not said["why"], said["why"]), said["fences"]
    if exit_code is None:
        return Outcome(False, "time"), {}
    if exit_code < 0:
        known = {number.value: number.name for number in signal.Signals}  # not the real-time signals
        return Outcome(False, f"signal {known.get(-exit_code, -exit_code)}"), {}
    return Outcome(False, f"it left before its end (exit code {exit_code})"), {}
