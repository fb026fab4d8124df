"""Signals: training saves first, everything else stops where it stands."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from btx import process
from btx.process import READER_GONE, SAVE_AND_END, Interrupted, Interrupts, ending_at_once
from tests.processes import start


@pytest.fixture
def interrupts():
    before = signal.getsignal(signal.SIGTERM)
    listening = Interrupts().listen()
    yield listening
    listening.unlisten()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_is_remembered_until_the_work_asks(interrupts: Interrupts) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts.pending == signal.SIGTERM
    with pytest.raises(Interrupted, match="saved") as caught:
        interrupts.raise_if_pending("saved")
    assert caught.value.exit_code == 128 + signal.SIGTERM


def test_work_that_loses_nothing_stops_at_once(interrupts: Interrupts) -> None:
    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("still working")

    with pytest.raises(Interrupted), interrupts.at_once():
        work()


def test_a_signal_that_came_before_stops_such_work_too(interrupts: Interrupts) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted), interrupts.at_once():
        raise AssertionError("begun all the same")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
def test_a_reader_that_has_gone_is_like_a_signal(
    interrupts: Interrupts, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def gone(line: str) -> None:
        raise OSError(number, "gone")

    monkeypatch.setattr(process, "tell", gone)
    monkeypatch.setattr(process, "say_no_more", lambda: None)
    interrupts.tell("a line")  # training goes on to the end of its step and saves
    with pytest.raises(Interrupted) as caught:
        interrupts.raise_if_pending("saved")
    assert caught.value.exit_code == READER_GONE


def signalled(*numbers: int) -> None:
    """Signals come one after the other; exit code 7 if the work was left to end by itself."""
    interrupts = Interrupts().listen()
    for number in numbers:
        if number == 0:
            interrupts._since -= process.SAME_EVENT_S  # time goes by
        else:
            os.kill(os.getpid(), number)
    os._exit(7 if interrupts.pending == numbers[0] else 8)


TERM, INT, HUP = int(signal.SIGTERM), int(signal.SIGINT), int(signal.SIGHUP)


@pytest.mark.parametrize(("numbers", "exit_code"), [
    ((TERM, TERM), 7), ((INT, TERM, TERM), 7), ((HUP, TERM), 7), ((TERM, int(SAVE_AND_END)), 7),
    ((TERM, 0, int(SAVE_AND_END)), 7),  # what `btx run` asks for is no second request, however late
    ((TERM, 0, TERM), 128 + TERM), ((INT, 0, INT), 128 + INT), ((TERM, 0, HUP), 128 + HUP),
])  # fmt: skip
def test_a_second_signal_is_a_new_one_only_after_a_second(
    numbers: tuple[int, ...], exit_code: int, tmp_path: Path
) -> None:
    done = start(signalled, *numbers, log=tmp_path / "log")
    done.join()
    assert done.exitcode == exit_code


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        interrupts = Interrupts().listen()
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.pending is None
        interrupts.unlisten()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_cleaning_up_is_not_ended_by_the_same_signal_again() -> None:
    cleaned: list[str] = []

    def work(cleaned: list[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append("all")

    with pytest.raises(Interrupted, match="nothing was written"), ending_at_once("nothing was written"):
        work(cleaned)
    assert cleaned == ["all"]
