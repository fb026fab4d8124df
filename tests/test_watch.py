"""`btx watch`: what it sees of a run in its files, how it shows that, when it ends, and that it ends nothing else."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from btx.errors import RunFolderError, StageFailed, UserError
from btx.files import write_json
from btx.metrics_file import MetricsTail
from btx.process import Interrupted
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.jobs import Job, note
from btx.run_folder.stage_notes import started_json
from btx.run_folder.status import forget_failure, note_failure
from btx.running import looks as looks_module
from btx.running import watch as watch_module
from btx.running.launchers import START, Standing
from btx.running.launchers.slurm import SlurmLauncher
from btx.running.looks import Look, Row, WatchedRun
from btx.running.watch import watch
from btx.running.watch_screens import LineScreen, TerminalScreen
from btx.running.watch_view import View, sparkline
from btx.sweeps.looks import WatchedSweep, watched_in
from btx.sweeps.sweep import write_sweep
from btx.sweeps.variants import plan_sweep
from tests.pico_run import pico_recipe

LOAD = [[0.5, 0.25, 0.25], [0.7, 0.25, 0.05]]


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "steps": 8, "tokens": 256 * step, "loss": 6.0 - step, "tokens_per_s": 12.8,
            "wall_s": 20 * step} | more  # fmt: skip


def text_of(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(each) + "\n" for each in lines)


def begin(run: RunFolder, stage: str, lines: list[dict[str, Any]], stump: str = "") -> None:
    """A stage that was begun and has done some steps."""
    write_json(run.folder(stage) / "started.json", started_json(run.graph[stage]))
    (run.folder(stage) / "metrics.jsonl").write_text(text_of(lines) + stump, "utf-8")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run whose branch `birds` has done 5 of 8 steps, one of them a spike that was left out."""
    run = RunFolder.create(pico_recipe(tmp_path))
    spike = {"spike": {"of": "loss", "usual": 2.0, "factor": 3.0, "counts_as": {}, "skipped": True}}
    begin(run, "train/birds", [line(1), line(2), line(3, **spike), line(4), line(5)], '{"step": 6, "st')
    return run


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "QUIET_S", 0.0)
    monkeypatch.setattr(watch_module, "PATIENCE_S", 0.3)
    monkeypatch.setattr(watch_module, "APPEARS_S", 0.01)


def rows_of(look: Look) -> dict[str, Row]:
    return {row.name: row for row in look.rows}


# What is read


def test_a_tail_reads_what_has_come_and_nothing_twice(tmp_path: Path) -> None:
    tail = MetricsTail(tmp_path / "metrics.jsonl")
    tail.look()
    assert tail.last is None
    tail.path.write_text(text_of([line(1)]) + json.dumps(line(2))[:20])
    tail.look()
    assert [step.number for step in tail.steps] == [1]
    with tail.path.open("a") as file:
        file.write(json.dumps(line(2))[20:] + "\n" + "{broken\n" + text_of([line(3)]))
    tail.look()
    assert [(step.number, step.loss) for step in tail.steps] == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert tail.last == line(3)


def test_a_training_that_was_resumed_is_read_anew(tmp_path: Path) -> None:
    tail = MetricsTail(tmp_path / "metrics.jsonl")
    tail.path.write_text(text_of([line(1), line(2), line(3)]))
    tail.look()
    tail.path.write_text(text_of([line(1), line(2, loss=9.0), line(3, loss=8.0), line(4)]))  # and is longer already
    tail.look()
    assert [step.loss for step in tail.steps] == [5.0, 9.0, 8.0, 2.0]
    with tail.path.open("a") as file:
        file.write(text_of([line(3, loss=7.0)]))  # a step done again
    tail.look()
    assert [step.loss for step in tail.steps] == [5.0, 9.0, 7.0]
    tail.path.unlink()
    tail.look()
    assert (tail.steps, tail.last) == ([], None)


def test_of_a_long_file_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("btx.metrics_file.MOST_BYTES", 250)
    tail = MetricsTail(tmp_path / "metrics.jsonl")
    tail.path.write_text(text_of([line(step) for step in range(1, 9)]))
    tail.look()
    assert [step.number for step in tail.steps] == [7, 8]


def test_a_training_under_way_is_a_row_with_all_there_is_to_know(run: RunFolder) -> None:
    watched = WatchedRun(run.path)
    row = rows_of(watched.look())["train/birds"]
    assert (row.state, row.step, row.steps, row.loss, row.spikes, row.skipped) == ("begun", 5, 8, 1.0, 1, 1)
    assert row.losses == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert not watched.look().is_under_way
    with exclusive(run.path, "train/birds"):
        row = rows_of(watched.look())["train/birds"]
        assert row.state == "running"
        assert row.note.startswith("on ")
        assert row.eta_s == pytest.approx(3 * 256 / 12.8)
        assert watched.look().is_under_way
    note_failure(run, "train/birds", "the loss is NaN in step 6")
    row = rows_of(watched.look())["train/birds"]
    assert (row.state, row.note, row.eta_s) == ("failed", "the loss is NaN in step 6", None)


@pytest.mark.parametrize(("stage", "names"), [
    ("finetune", ["birds", "tools", "generalist"]),
    ("baselines/upcycling_dm", ["expert 0", "expert 1", "expert 2"]),
])  # fmt: skip
def test_the_load_of_experts_is_the_mean_over_layers(tmp_path: Path, stage: str, names: list[str]) -> None:
    run = RunFolder.create(pico_recipe(tmp_path, "run", "baselines=[upcycling_dm]"))
    begin(run, stage, [line(1, load=LOAD, dead=[[1, 2]])])
    row = rows_of(WatchedRun(run.path).look())[stage]
    assert row.load == pytest.approx(dict(zip(names, (0.6, 0.25, 0.15), strict=True)))
    assert row.dead == 1


class Queue(SlurmLauncher):
    """Slurm, as far as it is asked how jobs stand."""

    asked = 0

    def poll(self, handles: Any) -> list[Standing]:
        Queue.asked += 1
        return [Standing("pending", why="Resources") for _ in handles]


def test_a_job_in_a_queue_is_seen_and_the_cluster_is_not_asked_at_every_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(START, "slurm", lambda launch, device: Queue(launch))
    run = RunFolder.create(pico_recipe(tmp_path, "run", "launch.kind=slurm"))
    note(run.path, Job(("train/birds",), "slurm", {"job_id": "12"}, "", "", 1))
    watched, Queue.asked = WatchedRun(run.path), 0
    for _ in range(3):
        look = watched.look()
    assert (rows_of(look)["train/birds"].state, rows_of(look)["train/birds"].note) == ("queued", "Resources")
    assert look.is_under_way
    assert Queue.asked == 1
    monkeypatch.setattr(looks_module, "ASK_EVERY_S", 0.0)
    watched.look()
    assert Queue.asked == 2


def test_where_a_cluster_cannot_be_asked_that_is_said_and_the_run_may_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = RunFolder.create(pico_recipe(tmp_path, "run", "launch.kind=slurm"))
    note(run.path, Job(("train/birds",), "slurm", {"job_id": "12"}, "", "", 1))
    look = WatchedRun(run.path).look()
    assert "train/birds" in look.remarks[0]
    assert look.is_under_way


def test_a_recipe_that_another_run_has_changed_is_read_anew(run: RunFolder, tmp_path: Path) -> None:
    watched = WatchedRun(run.path)
    assert "baselines/dense_dm" not in rows_of(watched.look())
    RunFolder.create(pico_recipe(tmp_path, "run", "baselines=[dense_dm]"))
    assert "baselines/dense_dm" in rows_of(watched.look())


# How it is shown


@pytest.mark.parametrize(("values", "width", "expected"), [
    ([], 5, ""), ([1.0], 5, "▁"), ([2.0, 2.0], 5, "▁▁"), ([0.0, 7.0], 5, "▁█"), ([7.0, 0.0, 7.0, 0.0], 2, "▁▁"),
    ([0, 0, 7, 7], 2, "▁█"), ([7, 6, 5, 4, 3, 2, 1, 0], 8, "█▇▆▅▄▃▂▁"), ([1.0, 2.0], 0, ""),
])  # fmt: skip
def test_a_curve_is_means_of_equal_parts(values: list[float], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected


ROWS = [
    *(Row(f"data/{number}", "done") for number in range(12)),
    Row("train/birds", "running", "on node7, 4 processes", 5, 8, 1.0, 12345.6, 60.0, [5.0, 4.0, 1.0], spikes=2),
    Row("finetune", "failed", "the \x1b[31mloss\x07 is NaN", 3, 8, 2.0, load={"birds": 0.9, "to\x1bols": 0.1}, dead=1),
    *(Row(f"baselines/{number}", "absent") for number in range(12)),
]


def drawn(width: int, height: int, *, whole: bool = False, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(
        file=file, width=width, height=height, force_terminal=True, color_system=None, legacy_windows=False
    )
    console.print(View(Look("pico, runs/pico: launcher local", ROWS, ("a remark",)), whole=whole))
    file.flush()
    return file.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [20, 40, 63, 80, 120, 200])
@pytest.mark.parametrize("height", [6, 12, 24, 60])
def test_a_view_fits_every_terminal_and_shows_first_what_is_at_work(width: int, height: int) -> None:
    lines = drawn(width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert any(each.startswith("train/birds") for each in lines)
    assert ("12 done" in "".join(lines)) == (height < 60)


def test_a_wide_view_says_everything() -> None:
    lines = drawn(160, 60)
    row = next(each for each in lines if each.startswith("train/birds"))
    assert row.split() == "train/birds running on node7, 4 processes 5/8 1.000 █▆▁ 12,346 1:00".split()
    text = "\n".join(lines)
    for part in ("finetune load ▇▂", "birds 90 %", "1 dead", "finetune failed: the  [31mloss  is NaN",
                 "train/birds: 2 spikes in loss or gradient", "a remark"):  # fmt: skip
        assert part in text
    assert "\x1b" not in text.replace("\x1b[0m", "")


def test_where_the_terminal_has_no_blocks_there_are_plain_signs() -> None:
    "".join(drawn(120, 60, encoding="ascii")).encode("ascii")


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", each) for each in capsys.readouterr().out.splitlines()]


def test_without_a_terminal_there_is_a_line_a_change(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    watched, screen = WatchedRun(run.path), LineScreen()
    screen.show(watched.look(), [])
    title, birds = lines_of(capsys)
    assert title.startswith("pico, ")
    assert birds == "train/birds: begun, step 5/8, loss 1.000, 13 tokens/s, 1 spike (1 left out)"
    screen.show(watched.look(), ["a remark"])
    screen.show(watched.look(), ["a remark"])
    assert lines_of(capsys) == ["warning: a remark"]
    with (run.folder("train/birds") / "metrics.jsonl").open("a") as file:
        file.write("eps\n" + text_of([line(6)]))
    screen.show(watched.look(), [])
    assert lines_of(capsys) == ["train/birds: begun, step 6/8, loss 0.000, 13 tokens/s, 1 spike (1 left out)"]


def test_as_json_every_line_is_an_object(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    begin(run, "finetune", [line(1, load=LOAD)])
    watch(lambda: watched_in(run.path), run.path, LineScreen(as_json=True))
    rows = [json.loads(each) for each in capsys.readouterr().out.splitlines()]
    assert [(row["name"], row["step"]) for row in rows] == [("train/birds", 5), ("finetune", 1)]
    assert rows[1]["load"]["birds"] == pytest.approx(0.6)


# When it ends


def test_it_ends_when_nobody_is_at_work(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with exclusive(run.path, "run"):
        watching = threading.Thread(target=watch, args=(lambda: watched_in(run.path), run.path, LineScreen(0.02)))
        watching.start()
        watching.join(0.3)
        assert watching.is_alive()
    watching.join(5)
    assert not watching.is_alive()
    assert lines_of(capsys)[-1] == f"{run.path}: nobody is at work on it"


def test_it_fails_if_the_run_has_failed(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    note_failure(run, "train/birds", "the loss is NaN in step 6")
    with pytest.raises(StageFailed, match=r"nobody is at work on it: train/birds: the loss is NaN in step 6$"):
        watch(lambda: watched_in(run.path), run.path, LineScreen())
    with exclusive(run.path, "train/birds"):  # it is tried again
        watching = threading.Thread(target=watch, args=(lambda: watched_in(run.path), run.path, LineScreen(0.02)))
        watching.start()
        watching.join(0.3)
        forget_failure(run, "train/birds")
    watching.join(5)
    assert lines_of(capsys)[-1] == f"{run.path}: nobody is at work on it"


@pytest.mark.parametrize(("killed", "told"), [("run", "btx run: "), ("train-birds", "train/birds: ")])
def test_who_was_killed_has_failed(run: RunFolder, killed: str, told: str) -> None:
    (run.path / ".locks").mkdir(exist_ok=True)
    (run.path / ".locks" / f"{killed}.pid").write_text("4194305 on node7")
    with pytest.raises(StageFailed, match=f": {told}its process on node7 ended without a word: it was killed, or"):
        watch(lambda: watched_in(run.path), run.path, LineScreen())


def test_a_sweep_one_of_whose_runs_failed_has_failed(sweep: Path) -> None:
    with pytest.raises(StageFailed, match=r"pico \d: train/birds: out of memory$"):
        watch(lambda: watched_in(sweep), sweep, LineScreen())


def test_a_run_whose_recipe_is_being_written_may_appear(tmp_path: Path) -> None:
    (tmp_path / ".recipe.yaml.0123abcd.tmp").touch()
    assert watched_in(tmp_path) is None


def test_a_run_may_appear_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    watching = threading.Thread(target=watch, args=(lambda: watched_in(path), path, LineScreen()))
    watching.start()
    (path / ".locks").mkdir(parents=True)
    RunFolder.create(pico_recipe(tmp_path))
    watching.join(5)
    assert not watching.is_alive()
    assert "not there yet" in lines_of(capsys)[0]


@pytest.mark.parametrize(("make", "expected"), [
    (lambda path: None, "no run has begun here"),
    (lambda path: path.write_text("a file"), "this is no run folder"),
    (lambda path: write_json(path / "config.json", {}), "this is no run folder"),
])  # fmt: skip
def test_what_is_no_run_is_refused(tmp_path: Path, make: Callable[[Path], None], expected: str) -> None:
    make(tmp_path / "run")
    with pytest.raises(RunFolderError, match=expected):
        watch(lambda: watched_in(tmp_path / "run"), tmp_path / "run", LineScreen())


def test_a_run_folder_that_vanishes_is_waited_for_and_then_told(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "QUIET_S", 60.0)
    watched, looked = WatchedRun(run.path), []

    class Removed(LineScreen):
        def wait(self, at_most_s: float | None) -> None:
            shutil.rmtree(run.path, ignore_errors=True)
            looked.append(at_most_s)
            time.sleep(0.05)

    with pytest.raises(RunFolderError, match="there is no such folder here"):
        watch(lambda: watched, run.path, Removed())
    assert len(looked) > 2
    assert sum("cannot be read at the moment" in each for each in lines_of(capsys)) == 1


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of three runs: one trains, one has failed, one has not begun."""
    pico_recipe(tmp_path)
    plan = plan_sweep(str(tmp_path / "pico.yaml"), [f"data.root={tmp_path}", f"run={tmp_path / 'sweep'}"], rng_seeds=3)
    write_sweep(plan)
    for planned in plan.runs[:2]:
        begin(RunFolder.create(planned.recipe), "train/birds", [line(1), line(2)])
    note_failure(RunFolder(plan.runs[1].folder, plan.runs[1].recipe), "train/birds", "out of memory")
    return plan.folder


def test_of_a_sweep_there_is_a_row_a_run(sweep: Path) -> None:
    watched = WatchedSweep(sweep)
    with exclusive(sweep, "sweep"), exclusive(sweep / "pico" / "rng-3", "train/birds"):
        look = watched.look()
        assert look.is_under_way
    first, second, third = look.rows
    assert (first.name, first.state, first.step, first.loss) == ("pico 3", "running", 2, 4.0)
    assert first.note.startswith("train/birds, 0 of ")
    assert (second.state, second.note) == ("failed", "train/birds: out of memory")
    assert third.state == "absent"
    assert "0 of 3 runs done" in look.title
    assert not watched.look().is_under_way


def test_a_sweep_has_no_report_to_write(sweep: Path) -> None:
    with pytest.raises(UserError, match="--html is for one run"):
        watch(lambda: watched_in(sweep), sweep, LineScreen(), html=True)


def test_the_report_is_written_while_the_run_trains_but_not_while_the_run_writes_it(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    page, report = run.path / "report" / "index.html", watch_module.Report(run.path)
    with exclusive(run.path, "report"):
        assert report.write() == ""
        assert not page.exists()
    watch(lambda: watched_in(run.path), run.path, LineScreen(), html=True)
    assert "pico" in page.read_text("utf-8")
    (run.folder("finetune")).mkdir()
    (run.folder("finetune") / "metrics.jsonl").write_text("{broken\n" + text_of([line(1)]))
    assert "metrics.jsonl:1" in report.write()
    assert report.write_in_time() == ""  # not at every look
    watch(lambda: watched_in(run.path), run.path, LineScreen(), html=True)
    assert "warning: the report was not written this time" in capsys.readouterr().out


# On a terminal


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(24, 100)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "btx", *arguments], stdin=self.slave, stdout=self.slave, stderr=self.slave,
            start_new_session=True, env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.text = ""
        os.set_blocking(self.master, False)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read_until(self, wanted: str, seconds: float = 20.0) -> str:
        """What has come since the last call, up to `wanted`."""
        until, before = time.monotonic() + seconds, len(self.text)
        while wanted not in self.text[before:]:
            assert time.monotonic() < until, f"no {wanted!r} in {self.text[before:]!r}"
            try:
                self.text += os.read(self.master, 65536).decode("utf-8", "replace")
            except (BlockingIOError, OSError):
                time.sleep(0.02)
        return self.text[before:]


@pytest.fixture
def terminal(run: RunFolder) -> Iterator[Terminal]:
    with exclusive(run.path, "run"):
        started = Terminal("watch", str(run.path), "--every", "0.2")
        yield started
        if started.process.poll() is None:
            started.process.kill()
        started.process.wait()
        os.close(started.master)
        os.close(started.slave)


def test_on_a_terminal_it_follows_the_run_and_the_size_and_leaves_all_in_order(
    run: RunFolder, terminal: Terminal
) -> None:
    first = terminal.read_until("5/8")
    assert "\x1b[?1049h" in first  # the other screen
    assert "tokens/s" in first
    with (run.folder("train/birds") / "metrics.jsonl").open("a") as file:
        file.write("eps\n" + text_of([line(6)]))
    terminal.read_until("6/8")
    terminal.resize(10, 50)
    terminal.read_until("12 to come")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.process.wait(10) == 0
    last = terminal.read_until("nothing else was stopped")
    assert "\x1b[?1049l" in last
    assert "\x1b[?25h" in last  # the cursor is back
    assert "train/birds" in last.partition("\x1b[?1049l")[2]  # what was seen last stays


def test_any_error_leaves_the_terminal_in_order() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=20)

    def failing() -> None:
        with TerminalScreen(console) as screen:
            screen.say("waiting")
            screen.show(Look("pico", ROWS), [])
            raise Interrupted("stopped", 2)

    with pytest.raises(Interrupted):
        failing()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("\x1b[?1049h") == text.count("\x1b[?1049l") == 1
