"""Two machines on one run folder: only one works, whether or not the file system has locks, and a dead one's work is
taken over."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from btx.errors import RunFolderError
from btx.run_folder import lease
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.status import at_work
from tests.pico_run import pico_recipe
from tests.processes import start, start_btx

NO_LOCKS = {"no locks": errno.ENOLCK, "not supported": errno.EOPNOTSUPP, "locks hold on one machine": 0}
LEASE_S, BEAT_S = 1.0, 0.2


def without_locks(patch: pytest.MonkeyPatch, answer: int) -> None:
    """flock answers as on a mount without locks; 0: as on one that knows only its own machine's."""

    def flock(descriptor: int, operation: int) -> None:
        if answer:
            raise OSError(answer, os.strerror(answer))

    patch.setattr(fcntl, "flock", flock)
    patch.setattr(lease, "LEASE_S", LEASE_S)
    patch.setattr(lease, "BEAT_S", BEAT_S)


def work_elsewhere(run: str, node: str, answer: int) -> None:
    """Be at work on another machine until the folder has a file `end`."""
    with pytest.MonkeyPatch.context() as patch:
        without_locks(patch, answer)
        patch.setattr(platform, "node", lambda: node)
        patch.setattr(socket, "gethostname", lambda: node)
        with exclusive(Path(run), "run"):
            (Path(run) / "at_work").touch()
            while not (Path(run) / "end").exists():
                time.sleep(0.02)
            (Path(run) / "written").touch()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run", pico_recipe(tmp_path))


def elsewhere(run: RunFolder, answer: int, log: Path) -> BaseProcess:
    process = start(work_elsewhere, str(run.path), "other", answer, log=log)
    while not (run.path / "at_work").exists():
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)
    return process


@pytest.fixture(params=NO_LOCKS.values(), ids=NO_LOCKS.keys())
def answer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    without_locks(monkeypatch, request.param)
    return int(request.param)


@pytest.mark.long
def test_of_two_coordinators_on_two_machines_one_is_refused_and_takes_over_when_the_other_machine_dies(
    run: RunFolder, answer: int, tmp_path: Path
) -> None:
    other = elsewhere(run, answer, tmp_path / "log")
    expected = f"run is in use by process {other.pid} on other"
    with pytest.raises(RunFolderError, match=expected), exclusive(run.path, "run"):
        pytest.fail("two at work")
    assert at_work(run.path, "run") == "other"
    other.kill()  # the machine is gone: nothing of it is taken back
    other.join()
    assert (run.path / ".locks" / "run.pid").exists()
    began = time.monotonic()
    with exclusive(run.path, "run"):
        assert time.monotonic() - began > LEASE_S / 2, "waited for a sign of life"
        assert at_work(run.path, "run") == platform.node()
    assert at_work(run.path, "run") is None


@pytest.mark.long
def test_a_machine_that_wakes_when_its_work_was_taken_over_writes_nothing_more(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_locks(monkeypatch, errno.ENOLCK)
    other = elsewhere(run, errno.ENOLCK, tmp_path / "log")
    psutil.Process(other.pid).suspend()
    with exclusive(run.path, "run"):
        os.kill(other.pid or 0, signal.SIGCONT)
        other.join()
    assert other.exitcode == 1
    assert "may have taken over its work" in (tmp_path / "log").read_text()
    assert not (run.path / "written").exists()


def test_a_process_of_this_machine_that_was_killed_is_not_waited_for(run: RunFolder, tmp_path: Path) -> None:
    before, lease.LEASE_S = lease.LEASE_S, 60.0
    try:
        process = start(work_elsewhere, str(run.path), platform.node(), 0, log=tmp_path / "log")
        while not (run.path / "at_work").exists():
            time.sleep(0.01)
        process.kill()
        process.join()
        began = time.monotonic()
        with exclusive(run.path, "run"):
            assert time.monotonic() - began < 10
    finally:
        lease.LEASE_S = before


@pytest.mark.parametrize("left", [
    "", "filelock/2\npid=1", "\0" * 100,
])  # fmt: skip
@pytest.mark.long
def test_a_lease_whose_owner_was_killed_while_it_made_it_is_taken_over(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", LEASE_S)
    monkeypatch.setattr(lease, "BEAT_S", 3 * BEAT_S)
    lease.lock_file(run.path, "run", "lease").parent.mkdir()
    lease.lock_file(run.path, "run", "lease").write_text(left)
    with exclusive(run.path, "run", patience_s=10):
        assert at_work(run.path, "run") == platform.node()


def listens(pid: int) -> bool:
    """Whether a process has said what it does at SIGTERM."""
    (caught,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_signal_ends_the_waiting_for_another_process(run: RunFolder, tmp_path: Path) -> None:
    """Training would finish its step first; who waits has none."""
    with exclusive(run.path, "data/tokenizer"):
        RunFolder.create(pico_recipe(tmp_path))
        waiting = start_btx("work", run.path, "data/tokenizer", log=tmp_path / "log")
        while not listens(waiting.pid or 0):
            time.sleep(0.02)
        psutil.Process(waiting.pid).terminate()
        began = time.monotonic()
        waiting.join()
        assert time.monotonic() - began < 30
    assert waiting.exitcode == 128 + signal.SIGTERM


@pytest.mark.parametrize("shift_s", [-7200.0, 7200.0])
@pytest.mark.long
def test_a_clock_that_was_set_makes_nobody_dead_or_alive(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, shift_s: float, tmp_path: Path
) -> None:
    """The owner's signs of life bear another time than ours: they are watched, not compared."""
    without_locks(monkeypatch, errno.ENOLCK)
    other = elsewhere(run, errno.ENOLCK, tmp_path / "log")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift_s)
    assert at_work(run.path, "run") == "other"
    with pytest.raises(RunFolderError, match="in use"), exclusive(run.path, "run"):
        pytest.fail("two at work")
    other.kill()
    other.join()
    then = real() + shift_s
    os.utime(run.path / ".locks" / "run.lease", (then, then))
    assert at_work(run.path, "run") is None
    with exclusive(run.path, "run"):
        pass
