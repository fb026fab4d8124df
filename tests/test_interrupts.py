"""Signals: training saves first, everything else stops where it stands."""

from __future__ import annotations

import os
import signal
import time

import pytest

from btx.process import Interrupted, Interrupts


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
