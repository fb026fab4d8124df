"""One of several processes that train a model together is killed: all end, it is said which, and the next start ends
bit for bit as if nothing had been."""

from __future__ import annotations

import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from btx.files import file_sha256
from btx.metrics_file import last_metrics
from btx.run_folder.folder import RunFolder
from btx.run_folder.status import run_status
from tests.pico_run import pico_recipe, run_here
from tests.processes import start_btx

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
STAGE = "train/birds"
STEPS = 60


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    """A run ready to train a branch in two processes, and the hash of what they train when nothing disturbs them."""
    overrides = (f"train.tokens={256 * STEPS}", "seed_model.train.tokens=512", "launch.processes.train=2")
    run, _ = run_here(pico_recipe(tmp_path_factory.mktemp("ranks"), "run", *overrides), ["data", "seed"])
    log = run.path.with_name("log")
    alone = start_btx("work", run.path, STAGE, log=log)
    alone.join()
    assert alone.exitcode == 0, log.read_text()
    return run, file_sha256(run.model(STAGE) / "model.safetensors")


def ranks(run: RunFolder, work: BaseProcess, log: Path) -> list[psutil.Process]:
    """The processes that train together, the first one first, when they have done some steps."""
    while (last_metrics(run.folder(STAGE) / "metrics.jsonl") or {"step": 0})["step"] < 8:
        assert work.is_alive(), log.read_text()
        time.sleep(0.02)
    first = psutil.Process(int((run.path / ".locks" / "train-birds.pid").read_text().split()[0]))
    others = [process for process in first.parent().children() if process != first]
    return [first, *sorted(others, key=lambda process: -process.memory_info().rss)[:1]]


@pytest.mark.parametrize("victim", ["the first", "another", "the one that started them"])
def test_a_killed_rank_ends_all_and_the_next_start_ends_as_if_it_had_not_been(
    shared: tuple[RunFolder, str], tmp_path: Path, victim: str
) -> None:
    run, undisturbed = shared
    shutil.rmtree(run.folder(STAGE))
    log = tmp_path / "log"
    work = start_btx("work", run.path, STAGE, log=log)
    processes = ranks(run, work, log)
    assert len(processes) == 2
    if victim == "the one that started them":
        work.kill()
    else:
        processes[victim == "another"].send_signal(signal.SIGKILL)
    work.join()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, "nobody trains on without the others"
    again = RunFolder(run.path, run.recipe)
    assert again.state(again.graph[STAGE]) == "begun"
    if victim != "the one that started them":
        assert work.exitcode == 1, log.read_text()
        assert "SIGKILL" in log.read_text()
        assert [row["state"] for row in run_status(again) if row["stage"] == STAGE] == ["failed"]
    last = start_btx("work", run.path, STAGE, log=log)
    last.join()
    assert last.exitcode == 0, log.read_text()
    assert "resumed after step" in log.read_text()
    assert file_sha256(run.model(STAGE) / "model.safetensors") == undisturbed
