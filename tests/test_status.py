"""How far a run is, and when it will be done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from btx.cli.tables import status_table
from btx.errors import UserError
from btx.files import write_json
from btx.number_texts import clock_text
from btx.process import Interrupted
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.jobs import Job
from btx.run_folder.stage_notes import started_json
from btx.run_folder.status import run_status, stage_status, trying
from btx.running.launchers import Standing
from btx.running.progress import Display
from btx.running.under_way import add_known
from tests.pico_run import pico_recipe


@pytest.fixture
def training(tmp_path: Path) -> RunFolder:
    """A run whose branch `birds` has done 5 of 8 steps of 256 tokens, at 12.8 tokens/s."""
    run = RunFolder(tmp_path / "run", pico_recipe(tmp_path))
    stage = run.graph["train/birds"]
    write_json(run.folder(stage.name) / "started.json", started_json(stage))
    lines = [
        {"step": step, "steps": 8, "tokens": 256 * step, "loss": 6.0 - step, "tokens_per_s": 12.8, "wall_s": 20 * step}
        for step in range(1, 6)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder(stage.name) / "metrics.jsonl").write_text(text + '{"step": 6, "st', "utf-8")  # being written
    return run


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0:00"), (7.4, "0:07"), (59.4, "0:59"), (59.6, "1:00"), (60, "1:00"), (125, "2:05"),
    (3599.4, "59:59"), (3599.7, "1:00:00"), (3725, "1:02:05"), (100 * 3600 + 60, "100:01:00"),
])  # fmt: skip
def test_a_clock_never_shows_sixty_seconds_or_minutes(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


def test_the_time_left_is_that_of_the_steps_left_at_the_present_speed(training: RunFolder) -> None:
    status = stage_status(training, training.graph["train/birds"])
    assert (status.state, status.step, status.steps, status.loss) == ("begun", 5, 8, 1.0)
    assert status.eta_s == pytest.approx(3 * 256 / 12.8)  # a minute


def test_a_minute_left_is_shown_as_one(training: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=120, record=True)
    console.print(status_table(run_status(training)))
    row = next(line for line in console.export_text().splitlines() if "train/birds" in line)
    assert row.split("│")[-2].strip() == "1:00"
    capsys.readouterr()
    Display(Console(force_terminal=False)).update(stage_status(training, training.graph["train/birds"]))
    assert capsys.readouterr().out.endswith("train/birds: step 5/8, loss 1.000, 13 tokens/s, ETA 1:00\n")


def state_and_why(run: RunFolder) -> tuple[str, str | None]:
    status = stage_status(run, run.graph["train/birds"])
    return status.state, status.why


@pytest.mark.parametrize(("error", "why"), [
    (UserError("two things are wrong\nthe second"), "the second"),
    (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    (FileNotFoundError(2, "No such file or directory", "/there/a.jsonl"),
     "/there/a.jsonl: cannot be used (No such file or directory)"),
])  # fmt: skip
def test_a_stage_has_failed_until_it_is_tried_again(training: RunFolder, error: Exception, why: str) -> None:
    with pytest.raises(type(error)), trying(training, "train/birds"):
        raise error
    assert state_and_why(training) == ("failed", why)
    status = stage_status(training, training.graph["train/birds"])
    assert (status.step, status.loss, status.eta_s) == (5, 1.0, None)
    with trying(training, "train/birds"):
        assert state_and_why(training) == ("begun", None)
    assert state_and_why(training) == ("begun", None)


def test_a_process_that_was_killed_and_its_machine_are_named(training: RunFolder) -> None:
    (training.path / ".locks").mkdir()
    (training.path / ".locks" / "train-birds.pid").write_text("4194305 on node7")
    gone = "its process on node7 ended without a word: it was killed, or the machine is gone"
    assert state_and_why(training) == ("begun", gone)
    rows = run_status(training)
    add_known(rows, [(Job(("train/birds",), "slurm", {"job_id": "7"}, "", "", 1), Standing("queued", why="BeginTime"))])
    (row,) = (row for row in rows if row["stage"] == "train/birds")
    assert (row["state"], row["why"]) == ("queued", f"BeginTime; {gone}")
    with exclusive(training.path, "train/birds"):
        assert state_and_why(training) == ("running", None)
    assert state_and_why(training) == ("begun", None)


def test_what_was_interrupted_has_not_failed(training: RunFolder) -> None:
    with pytest.raises(Interrupted), trying(training, "train/birds"):
        raise Interrupted("stopped", 15)
    assert state_and_why(training) == ("begun", None)
