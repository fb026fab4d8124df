"""A job that comes no further is asked to save, ended and counted as failed; one that is only slow is left alone."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from btx import process
from btx.errors import StageFailed
from btx.process import Interrupted, Interrupts, ending_if_hung, note_progress
from btx.run_folder import lease
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.status import run_status
from btx.running.launchers import START
from btx.running.pipeline import run as run_pipeline
from btx.running.under_way import Silence
from tests.pico_run import pico_recipe, run_here
from tests.processes import ForkedLauncher, btx, start

LONG = "seed_model.train.tokens=256000"
LEASE_S, BEAT_S = 1.0, 0.2


def hanging(run: str, wakes: bool) -> None:
    """Train the seed model, whose third step waits for ever, or until it is asked to end."""
    from btx.training import step

    process.GRACE_S, asked, steps = 1.0, threading.Event(), step.at_step

    def at_step(model: Any, number: int) -> None:
        steps(model, number)
        while number == 3 and not (wakes and asked.is_set()):
            time.sleep(0.05)  # a signal's handler may run here, as in a call that returns at last

    step.at_step = at_step
    if wakes:
        note = Interrupts._note
        Interrupts._note = lambda self, *signal: (note(self, *signal), asked.set())[0]  # type: ignore[method-assign]
    btx("work", run, "seed")


def few_seconds(tmp_path: Path) -> RunFolder:
    run_here(pico_recipe(tmp_path, "run", LONG), ["data"])
    return RunFolder.create(pico_recipe(tmp_path, "run", LONG, "launch.hung_after_s=2"))


@pytest.mark.parametrize(("wakes", "code"), [
    (False, 1), (True, 128 + signal.SIGTERM),
])  # fmt: skip
@pytest.mark.long
def test_a_job_that_comes_no_further_is_asked_to_save_then_ended_and_has_failed(
    tmp_path: Path, wakes: bool, code: int
) -> None:
    run = few_seconds(tmp_path)
    job = start(hanging, str(run.path), wakes, log=tmp_path / "log")
    job.join()
    said = (tmp_path / "log").read_text()
    assert job.exitcode == code, said
    assert "at_step" in said, "where it stands"
    assert "no progress for" in said.splitlines()[-1] or wakes
    saved = sorted(path.name for path in run.folder("seed").glob("state/step-*"))
    assert saved == (["step-00000003", "step-00000004"] if wakes else ["step-00000003"])
    (row,) = (row for row in run_status(run) if row["stage"] == "seed")
    assert (row["state"], row["why"][:15]) == ("failed", "no progress for")


def test_only_time_without_progress_counts_and_a_pause_of_the_whole_process_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "LOOK_S", 0.01)
    asked: list[str] = []
    interrupts = Interrupts().listen()
    try:
        with ending_if_hung(0.3, asked.append):
            for _ in range(10):
                time.sleep(0.05)
                note_progress()
            clock, jump = time.monotonic, 3600.0
            monkeypatch.setattr(time, "monotonic", lambda: clock() + jump)
            time.sleep(0.1)
            assert not asked
        with pytest.raises(Interrupted), interrupts.at_once(), ending_if_hung(0.1, asked.append):
            time.sleep(5)
    finally:
        interrupts.unlisten()
    assert len(asked) == 1


def stopped(*arguments: str) -> None:
    """A job that is stopped in the third step of the seed model, as by SIGSTOP."""
    from btx.training import step

    lease.LEASE_S, lease.BEAT_S, steps = LEASE_S, BEAT_S, step.at_step

    def at_step(model: Any, number: int) -> None:
        steps(model, number)
        if number == 3:
            os.kill(os.getpid(), signal.SIGSTOP)

    step.at_step = at_step
    btx("work", *arguments)


class Stopping(ForkedLauncher):
    """Starts such jobs."""

    def forked(self, run: Path, stages: Sequence[str], log: Path) -> BaseProcess:
        return start(stopped, str(run), *stages, log=log)


@pytest.mark.long
def test_a_job_that_is_stopped_is_ended_by_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = few_seconds(tmp_path)
    monkeypatch.setitem(START, "local", Stopping)
    monkeypatch.setattr(lease, "LEASE_S", LEASE_S)
    monkeypatch.setattr(lease, "BEAT_S", BEAT_S)
    with pytest.raises(StageFailed, match=r"(?s)seed failed \(signal 9\).*no sign of life for 2 s, as launch.hung"):
        run_pipeline(run.recipe, until="seed")
    (row,) = (row for row in run_status(run) if row["stage"] == "seed")
    assert (row["state"], row["why"][:12]) == ("failed", "stopped from")


@pytest.mark.long
def test_waiting_and_beating_jobs_are_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 0.4)
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    silence = Silence(tmp_path, ["seed", "train/birds"])

    def silent_for(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if silence.exceeds(0.2):
                return True
            time.sleep(0.02)
        return False

    assert not silent_for(0.6)
    with exclusive(tmp_path, "train/birds"):
        assert not silent_for(0.8)
    (tmp_path / ".locks" / "train-birds.lease").write_text(f"of a process that is gone: {os.getpid()}")
    assert silent_for(2.0)
