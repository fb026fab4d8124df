"""Jobs that are under way: found again, followed, cancelled."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from btx.errors import NOT_YET
from btx.run_folder.folder import exclusive
from btx.run_folder.jobs import JobFile, jobs_of
from btx.running.log_tail import LogTail, last_lines
from btx.stages import work
from tests.pico_run import pico_recipe, run_here, write_pico_recipe
from tests.processes import btx_here, run_with_forked_jobs, start


def until(holds: Callable[[], object]) -> None:
    ends = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < ends, "it did not come to that"
        time.sleep(0.05)


def test_a_log_is_read_on_where_it_was_cut_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("before\n")
    tail = LogTail.from_now(path)
    with open(path, "a") as file:
        file.write("one\nhal")
    assert tail.new_lines() == ["one"]
    with open(path, "a") as file:
        file.write("f\n")
    assert tail.new_lines() == ["half"]
    path.write_text("cut\n")
    assert tail.new_lines() == ["cut"]
    path.rename(tmp_path / "a.log.1")
    assert tail.new_lines() == []
    path.write_text("a new file that is longer than the one before\n")
    assert tail.new_lines() == ["a new file that is longer than the one before"]
    assert last_lines(path, 5) == ["a new file that is longer than the one before"]
    assert last_lines(tmp_path / "a.log.1", 0) == last_lines(tmp_path / "none", 5) == []


def test_a_job_whose_time_has_not_come_ends_with_75_and_one_that_is_done_with_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = run_here(pico_recipe(tmp_path), ["data/tokenizer"])
    code, _, errors = btx_here("work", run.path, "train/birds", cwd=tmp_path)
    assert (code, "not yet: train/birds needs data/birds, which is absent" in errors) == (NOT_YET, True)
    assert btx_here("work", run.path, "data/tokenizer", cwd=tmp_path)[0] == 0
    monkeypatch.setattr(work, "ENDING_S", 0.0)
    with exclusive(run.path, "data/birds"):
        code, _, errors = btx_here("work", run.path, "data/birds", cwd=tmp_path)
        assert (code, "data/birds is in use by process" in errors) == (NOT_YET, True)
    assert btx_here("finetune", run.path, cwd=tmp_path)[0] == 2  # by hand it is the user's mistake
    recipe = run.path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("vocab_size: 320", "vocab_size: 310"))
    assert btx_here("work", run.path, "data/birds", cwd=tmp_path)[0] == 2  # stale: time alone does not mend it


@pytest.fixture
def start_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], BaseProcess]]:
    """start_run(log): `btx run long.yaml --until seed`, killed at the end if it is still there."""
    monkeypatch.chdir(tmp_path)
    started = []

    def start_it(log: Path) -> BaseProcess:
        log.touch()
        started.append(start(run_with_forked_jobs, "long.yaml", "--until", "seed", log=log))
        return started[-1]

    yield start_it
    for process in started:
        process.kill()
        process.join()


@pytest.mark.long
def test_jobs_are_followed_cancelled_found_again_and_go_on(
    tmp_path: Path, start_run: Callable[[Path], BaseProcess]
) -> None:
    write_pico_recipe(tmp_path)
    settings = [f"seed_model.train.{setting}" for setting in
                ("tokens=480000", "checkpoint_every=1000", "batch_tokens=64", "micro_batch_tokens=64")]  # fmt: skip
    run, _ = run_here(pico_recipe(tmp_path, "run", *settings), ["data"])
    (tmp_path / "long.yaml").write_text((run.path / "recipe.yaml").read_text())
    metrics = run.path / "seed" / "metrics.jsonl"

    def steps() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    early = start_run(tmp_path / "early.txt")
    until(lambda: jobs_of(run))  # its job has begun but holds no work yet
    os.kill(jobs_of(run)[0].handle["pid"], signal.SIGSTOP)
    assert btx_here("cancel", "run", "seed", cwd=tmp_path)[:2] == (0, "asked to save and end: seed\n")
    os.kill(jobs_of(run)[0].handle["pid"], signal.SIGCONT)
    early.join(60)
    assert (early.exitcode, jobs_of(run)) == (1, [])
    assert "seed: cancelled" in (tmp_path / "early.txt").read_text()

    first = start_run(tmp_path / "first.txt")
    until(lambda: steps() > 2)
    (job,) = jobs_of(run)
    assert (job.stages, job.launcher, job.handle["node"]) == (("seed",), "local", os.uname().nodename)
    file = json.loads((run.path / "jobs" / "seed.json").read_text())
    assert file.keys() == JobFile.__annotations__.keys()
    code, printed, _ = btx_here("logs", "run", "seed", "--lines", "99", cwd=tmp_path)
    assert (code, "precision: float32" in printed) == (0, True)
    code, printed, _ = btx_here("cancel", "run", "seed", cwd=tmp_path)
    assert (code, printed) == (0, "asked to save and end: seed\n")
    first.join(60)
    assert first.exitcode == 1
    assert "seed: cancelled" in (tmp_path / "first.txt").read_text()
    assert jobs_of(run) == []
    assert btx_here("cancel", "run", cwd=tmp_path)[1] == "run: nothing is under way here\n"

    second = start_run(tmp_path / "second.txt")
    saved = steps()
    until(lambda: steps() > saved)
    (orphan,) = jobs_of(run)
    second.kill()  # its job saves and ends, a moment later
    second.join()
    third = start_run(tmp_path / "third.txt")
    until(lambda: [job for job in jobs_of(run) if job.handle["pid"] != orphan.handle["pid"]])
    saved = steps()
    until(lambda: steps() > saved)
    code, printed, _ = btx_here("cancel", "run", cwd=tmp_path)
    assert (code, printed) == (0, "asked to save and end: btx run, seed\n")
    third.join(60)
    assert third.exitcode == 128 + signal.SIGTERM
    code, printed, _ = btx_here("logs", "run", "-f", "-n", "1", cwd=tmp_path)  # nothing is under way: it ends
    assert (code, "seed" in printed) == (0, True)
