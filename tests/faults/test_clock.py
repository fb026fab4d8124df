"""Clocks that are set back: no name is taken twice, and no duration is negative."""

from __future__ import annotations

import datetime as datetime_module
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from btx.files import write_text
from btx.run_folder import folder as folder_module
from btx.run_folder.folder import RunFolder
from tests.pico_run import pico_recipe, run_here


def test_what_gives_way_twice_at_one_time_is_kept_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Standing(datetime_module.datetime):
        @classmethod
        def now(cls, tz: datetime_module.tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime(2026, 1, 1, tzinfo=UTC)

    monkeypatch.setattr(folder_module, "datetime", Standing)
    run = RunFolder(tmp_path / "run", pico_recipe(tmp_path))
    for text in ("one", "two", "three"):
        write_text(run.folder("seed") / "file", text)
        run.set_aside("seed")
    kept = sorted((run.path / "stale").glob("*/seed/file"))
    assert [path.read_text() for path in kept] == ["one", "two", "three"]


def test_a_run_under_a_clock_that_jumps_back_takes_no_negative_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() - 3600.0 * next(calls))
    run, _ = run_here(pico_recipe(tmp_path, "run", "seed_model.train.tokens=512"), ["data", "seed"])
    for stage in ("data/birds", "seed"):
        assert 0 < (run.done(stage) or {})["wall_s"] < 600
    assert run.state(run.graph["seed"]) == "done"
