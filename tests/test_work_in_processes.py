"""`btx work` of a stage that two processes train: real processes, signals to them, deaths among them, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from btx import process
from btx.errors import StageFailed
from btx.files import read_json
from btx.process import Interrupts, Log, rank
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.status import stage_status
from btx.stages.processes import train_in_processes
from btx.stages.work import run_stages
from btx.training.meeting import first_host, meeting, node_number
from tests.pico_run import pico_recipe, run_here
from tests.processes import btx, btx_with_quick_ranks, start

STAGE, STEPS = "train/birds", 30


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its seed model, whose branches two processes train."""
    folder = tmp_path_factory.mktemp("prepared")
    recipe = pico_recipe(folder, "run", f"train.tokens={256 * STEPS}", "train.checkpoint_every=4",
                         "launch.processes={train: 2}", "launch.threads=2")  # fmt: skip
    run, _ = run_here(recipe, ["data", "seed"])
    return run.path


def work(run: Path, stage: str = STAGE) -> BaseProcess:
    return start(btx_with_quick_ranks, "work", str(run), stage, log=run / "log")


def ended(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode


def steps(run: Path) -> list[int]:
    file = run / STAGE / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def weights(run: Path) -> bytes:
    return (run / STAGE / "model" / "model.safetensors").read_bytes()


def forked() -> set[int]:
    """Processes that there are beside this one's."""
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return {child.pid for child in psutil.Process(server).children() if child.status() != psutil.STATUS_ZOMBIE}


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(prepared, run, symlinks=True)
    assert ended(work(run)) == 0, (run / "log").read_text()
    assert steps(run) == list(range(1, STEPS + 1))
    assert read_json(run / STAGE / "done.json")["processes"] == 2
    assert "2 processes train its model" in (run / "log").read_text()
    return weights(run)


@pytest.mark.long
@pytest.mark.parametrize("who", ["told", "one killed", "starter killed"])
def test_whatever_stops_it_all_end_and_it_goes_on_bit_for_bit(
    prepared: Path, undisturbed: bytes, tmp_path: Path, who: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared, run, symlinks=True)
    before, process = forked(), work(run)
    wait_for(lambda: len(steps(run)) >= 6)
    first = int((run / ".locks" / "train-birds.pid").read_text().split()[0])
    assert first != process.pid
    if who == "one killed":
        os.kill(first, signal.SIGKILL)
    else:
        os.kill(process.pid or 0, signal.SIGTERM if who == "told" else signal.SIGKILL)
    code, said = ended(process), (run / "log").read_text()
    if who == "told":
        assert code == 128 + signal.SIGTERM
        assert said.count(f"stopped after step {steps(run)[-1]} of {STEPS}") == 1, said
    elif who == "one killed":
        assert code == 1
        assert said.count("process 0 of them was ended by signal 9 (SIGKILL)") == 1, said
        assert "Traceback" not in said
    wait_for(lambda: forked() <= before)
    with exclusive(run, STAGE):
        assert not (run / STAGE / "done.json").exists()
    if who != "one killed":
        saved = sorted((run / STAGE / "state").glob("step-*"))[-1]
        assert saved.name == f"step-{steps(run)[-1]:08d}", "all have saved the step that was the last"
        assert len(list(saved.glob("part-*"))) == 2
    assert ended(work(run)) == 0, (run / "log").read_text()
    assert "resumed after step" in (run / "log").read_text()
    assert weights(run) == undisturbed


def hang_in_step_three(run: RunFolder, names: Sequence[str], interrupts: Interrupts, log: Log) -> None:
    """`run_stages` of which the second process's third step waits until somebody ends it, or stops as by SIGSTOP."""
    from btx.training import step

    process.GRACE_S, steps = 1.0, step.at_step

    def at_step(model: Any, number: int) -> None:
        steps(model, number)
        if number == 3 and rank() == 1 and (run.path / "stop").exists():
            os.kill(os.getpid(), signal.SIGSTOP)
        while number == 3 and rank() == 1 and interrupts.pending is None:
            time.sleep(0.05)

    step.at_step = at_step
    run_stages(run, names, interrupts, log)


def work_that_hangs(path: str) -> None:
    """`btx work` with such processes."""
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    run = RunFolder.open(path)
    try:
        train_in_processes(run, run.graph[STAGE], Interrupts().listen(), print, hang_in_step_three)
    except StageFailed as error:
        sys.exit(f"error: {error}")


@pytest.mark.long
@pytest.mark.parametrize(("stops", "expected"), [
    (False, r"process 1 of them hung in at_step \(test_work_in_processes\.py:\d+\); no progress for \d+ s, which "),
    (True, r"process 1 of them hung and gave no answer; no progress for \d+ s, which "),
])  # fmt: skip
def test_of_processes_that_come_no_further_the_one_that_hangs_is_named_in_the_runs_note_and_what_to_do(
    prepared: Path, undisturbed: bytes, tmp_path: Path, stops: bool, expected: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared, run, symlinks=True)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["launch"]["hung_after_s"] = 12
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if stops:
        (run / "stop").touch()
    hanging = start(work_that_hangs, str(run), log=run / "log")
    assert ended(hanging) == 1, (run / "log").read_text()
    said, opened = (run / "log").read_text(), RunFolder.open(run)
    status = stage_status(opened, opened.graph[STAGE])
    assert status.state == "failed"
    assert re.match(expected, status.why or ""), said
    assert f"`btx run {run}` goes on with it; if it was only slow, with a higher launch.hung_after_s" in status.why
    assert said.splitlines()[-1] == f"error: {STAGE}, trained by 2 processes: {status.why}"
    assert ended(work(run)) == 0, (run / "log").read_text()
    assert weights(run) == undisturbed


@pytest.mark.long
def test_two_processes_draw_and_train_the_seed_model_that_one_does(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared, run, symlinks=True)
    shutil.rmtree(run / "seed")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["launch"]["processes"] = {"seed": 2}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert ended(work(run, "seed")) == 0, (run / "log").read_text()
    one, two = (load_file(folder / "seed" / "model" / "model.safetensors") for folder in (prepared, run))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-6
    assert (run / "seed/model/config.json").read_bytes() == (prepared / "seed/model/config.json").read_bytes()


def test_what_the_user_has_to_mend_is_told_once(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared, run, symlinks=True)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["launch"]["processes"] = 3
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    process = work(run)
    assert ended(process) == 2
    lines = [line for line in (run / "log").read_text().splitlines() if "cannot share equally" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: batch_tokens 256: a step has 8 sequences of 32 tokens, which 3 processes")


@pytest.mark.long
def test_under_a_torchrun_of_ones_own_needs_are_made_first_and_all_is_told_once(
    prepared: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(prepared, run, symlinks=True)
    shutil.rmtree(run / "data" / "birds")
    shutil.rmtree(run / "data" / "general")
    assert torchrun("finetune", run, log=log) == [2, 2]
    assert log.read_text() == f"error: finetune needs data/birds, which is absent; run `btx run {run}` first\n"
    assert torchrun("work", run, "finetune", log=log)[0] == 75
    assert torchrun("train", run, "birds", log=log) == [0, 0], log.read_text()
    assert log.read_text().count("data/birds: not there, made first") == 1
    assert weights(run) == undisturbed
    assert torchrun("train", run, "tools", log=log, count=3) == [2, 2, 2]
    assert log.read_text().count("cannot share equally") == 1


def torchrun(*arguments: str | Path, log: Path, count: int = 2) -> list[int | None]:
    """A command of btx as each of several processes that find each other as torchrun's do: by a store that it keeps."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    processes = [start(as_rank, rank, count, store.port, *map(str, arguments), log=log) for rank in range(count)]
    return [ended(process) for process in processes]


def as_rank(rank: int, count: int, port: int, *arguments: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    btx(*arguments)


def test_machines_meet_where_slurm_or_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from btx.errors import UserError

    for name in [name for name in os.environ if name.startswith(("SLURM_", "BTX_"))]:
        monkeypatch.delenv(name)
    assert meeting("train/x", 1).endpoint == "localhost:0"
    with pytest.raises(UserError, match="srun --nodes=2 --ntasks-per-node=1 btx work RUN train/x"):
        meeting("train/x", 2)
    for name, value in {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "10042",
                        "SLURM_JOB_NODELIST": "localhost,other[1-2]"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    met = meeting("train/x", 2)
    assert (met.endpoint, met.options) == ("localhost:20042", {"is_host": False})
    monkeypatch.setenv("BTX_HEAD", "head.example")
    monkeypatch.setenv("BTX_NODE", "0")
    met = meeting("train/x", 3)
    assert (met.endpoint, met.options) == ("head.example:29400", {"is_host": True})
    monkeypatch.setenv("BTX_NODE", "first")
    with pytest.raises(UserError, match=r"BTX_NODE=first: the number of this machine .* 0 on the first"):
        node_number()
    assert [first_host(names) for names in ("n1", "n[03-05,9],m1", "a,b", "gpu[7]x,b")] == ["n1", "n03", "a", "gpu7x"]
