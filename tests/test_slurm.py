"""A real Slurm cluster of two nodes: jobs, their dependencies, signals, queues and ends are Slurm's own."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from btx.cli.run_folders import open_run
from btx.run_folder.folder import RunFolder
from btx.stages.evaluate import models_of_run
from tests.pico_run import pico_recipe, run_here, write_pico_recipe
from tests.slurm_cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LONG = ["seed_model.train.tokens=76800", "train.tokens=76800", "finetune.tokens=25600",
        "seed_model.train.checkpoint_every=100", "train.checkpoint_every=100", "finetune.checkpoint_every=100",
        "evaluate.tasks={}"]  # fmt: skip
"""Training that is still at it when something happens to it."""


BRANCHES = ("train/birds", "train/tools")
STARTED: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def nothing_stays(slurm: Cluster) -> Iterator[None]:
    """What a test has started ends with it."""
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()
    slurm.empty()


def start(*arguments: str | Path, cwd: Path, to: Path) -> subprocess.Popen[bytes]:
    """A command of btx in a process of its own, which prints to a file."""
    with open(to, "wb") as output:
        STARTED.append(subprocess.Popen(
            [sys.executable, "-m", "btx", *map(str, arguments)], cwd=cwd, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
        ))  # fmt: skip
    return STARTED[-1]


def btx(*arguments: str | Path, cwd: Path) -> tuple[int, str]:
    """Exit code of a command of btx, and what it printed."""
    with tempfile.NamedTemporaryFile(suffix=".txt") as output:
        code = start(*arguments, cwd=cwd, to=Path(output.name)).wait()
        return code, Path(output.name).read_text()


def until(holds: Callable[[], Any], patience_s: float = 300.0) -> Any:
    ends = time.monotonic() + patience_s
    while not (found := holds()):
        assert time.monotonic() < ends, "it did not come to that"
        time.sleep(0.2)
    return found


def states(run: str, cwd: Path) -> dict[str, dict[str, Any]]:
    """Stage → its line of `btx status --json`."""
    code, output = btx("status", run, "--json", cwd=cwd)
    assert code == 0, output
    return {row["stage"]: row for row in json.loads(output)}


def job_of(run: Path, stage: str) -> str:
    """Number of the job that does a stage."""
    return str(json.loads((run / "jobs" / f"{stage.replace('/', '-')}.json").read_text())["handle"]["job_id"])


def steps(run: Path, stage: str) -> int:
    """How many steps a stage's metrics have."""
    path = run / stage / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def log(run: Path, stage: str) -> str:
    """What a job has printed; named as its first stage."""
    path = run / "logs" / f"{stage.replace('/', '-')}.log"
    return path.read_text() if path.exists() else ""


def weights(run: Path, stage: str = "finetune") -> str:
    return hashlib.sha256((run / stage / "model" / "model.safetensors").read_bytes()).hexdigest()


def queue(cluster: Cluster) -> str:
    return cluster.ask("squeue", "--noheader", "--format=%i %j %T %r")


def test_a_run_that_is_preempted_requeued_and_left_alone_gives_the_weights_of_a_local_one(
    slurm: Cluster, tmp_path: Path
) -> None:
    write_pico_recipe(tmp_path)
    settings = [*LONG, "launch.threads=1"]
    command = ("run", "pico.yaml", "run=s", *settings, "launch.kind=slurm", "launch.slurm.partition=spot")
    run, output = tmp_path / "s", tmp_path / "first.txt"
    first = start(*command, cwd=tmp_path, to=output)

    until(lambda: steps(run, "seed") > 5)
    rows = states("s", tmp_path)
    assert rows["train/birds"]["state"] == "queued"
    assert rows["data/birds"]["state"] == "done"

    until(lambda: steps(run, "train/birds") > 5 and steps(run, "train/tools") > 5)
    rows = states("s", tmp_path)
    assert {rows[f"train/{domain}"]["node"] for domain in ("birds", "tools")} <= {"n1", "n2"}
    first.kill()  # nobody watches, and all goes on
    first.wait()
    slurm.ask("scontrol", "requeue", job_of(run, "train/tools"))
    urgent = slurm.ask("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--ntasks-per-node=2",
                       "--output=/dev/null", "--wrap=sleep 1")  # fmt: skip
    until(lambda: slurm.ask("squeue", "--noheader", f"--jobs={urgent}", "--states=COMPLETED"))
    second = start(*command, cwd=tmp_path, to=tmp_path / "second.txt")
    assert second.wait() == 0, (tmp_path / "second.txt").read_text()
    assert "submitted before" in (tmp_path / "second.txt").read_text()
    assert list((run / "jobs").iterdir()) == []
    for stage in ("train/birds", "train/tools"):
        assert "resumed after step" in log(run, stage), log(run, stage)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    submitted = [event["job"] for event in events if event["event"] == "start"]
    assert len(submitted) == len(set(submitted))  # each job once, whoever watched

    local, _ = run_here(pico_recipe(tmp_path, "local", *settings), ["data", "seed", "train", "mix", "finetune"])
    assert weights(run) == weights(local.path)


def test_a_run_whose_node_dies_goes_on_on_the_other_and_gives_the_weights_of_a_local_one(
    slurm: Cluster, tmp_path: Path
) -> None:
    """And Slurm's controller is killed before and comes back, which costs nothing. The job of one branch is requeued by
    Slurm, that of the other, which may not be, has failed and is tried again."""
    write_pico_recipe(tmp_path)
    settings = ["train.tokens=153600", "train.checkpoint_every=20", "evaluate.tasks={}", "launch.threads=1"]
    run, output = tmp_path / "s", tmp_path / "output.txt"
    watching = start("run", "pico.yaml", "run=s", *settings, "launch.kind=slurm", "launch.slurm.partition=spot",
                     "launch.retries=1", "--until", "finetune", cwd=tmp_path, to=output)  # fmt: skip

    def signal_both(number: int) -> None:
        """However fast the machine trains, the branches are still at it: they stand still while Slurm is waited for."""
        for branch in BRANCHES:
            os.kill(int((run / ".locks" / f"{branch.replace('/', '-')}.pid").read_text().split()[0]), number)

    until(lambda: all(steps(run, branch) > 25 for branch in BRANCHES))
    signal_both(signal.SIGSTOP)
    slurm.kill("slurmctld")
    until(lambda: "the jobs go on, and it is asked again" in output.read_text())
    before = {branch: steps(run, branch) for branch in BRANCHES}
    signal_both(signal.SIGCONT)
    until(lambda: all(steps(run, branch) > before[branch] + 5 for branch in BRANCHES))
    signal_both(signal.SIGSTOP)
    slurm.start_controller()
    until(lambda: queue(slurm))
    rows, finished = states("s", tmp_path), weights(run, "seed")
    node = rows["train/birds"]["node"]
    assert rows["train/tools"]["node"] == node, "Slurm fills one node before the next"
    slurm.ask("scontrol", "update", f"JobId={job_of(run, 'train/tools')}", "Requeue=0")
    try:
        slurm.lose(node)
        assert states("s", tmp_path)["train/birds"]["node"] == node
        until(lambda: "train/birds: back in the queue" in output.read_text())
        row = states("s", tmp_path)["train/birds"]
        assert row["state"] == "queued"
        assert f"its process on {platform.node()} ended without a word" in row["why"]
        assert watching.wait(400) == 0, output.read_text()
    finally:
        slurm.start_node(node)
        slurm.await_idle()
    said = output.read_text()
    assert f"; it ran on {node}\n" in said
    assert f"train/tools: failed (NODE_FAIL on {node}): " in said
    assert said.count("tried again, 1 of 1") == 1
    assert all(log(run, branch).count("resumed after step") == 1 for branch in BRANCHES)
    assert [path.name for path in (run / "jobs").iterdir()] == []
    assert weights(run, "seed") == finished
    local, _ = run_here(pico_recipe(tmp_path, "local", *settings), ["data", "seed", "train", "mix", "finetune"])
    assert {stage: weights(run, stage) for stage in (*BRANCHES, "finetune")} == {
        stage: weights(local.path, stage) for stage in (*BRANCHES, "finetune")
    }


def test_what_waits_for_a_job_that_failed_does_not_wait_for_ever(slurm: Cluster, tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    command = ("run", "pico.yaml", "run=s", "launch.kind=slurm", "--until", "mix")
    code, output = btx(*command, "launch.slurm.stages.train.setup=[echo no such module >&2, exit 3]", cwd=tmp_path)
    assert code == 1, output
    assert re.search(r"train/birds failed \(exit code 3 on n[12]\)", output), output
    assert "no such module" in output
    assert "not begun: mix" in output
    assert queue(slurm) == ""
    assert states("s", tmp_path)["train/birds"]["state"] == "failed"
    code, output = btx(*command, cwd=tmp_path)
    assert code == 0, output


def test_jobs_out_of_time_go_on_and_are_followed_and_cancelled_from_elsewhere(slurm: Cluster, tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    command = ("run", "pico.yaml", "run=s", *LONG, "seed_model.train.tokens=480000", "launch.kind=slurm",
               "seed_model.train.batch_tokens=64", "seed_model.train.micro_batch_tokens=64",
               "launch.slurm.time='60'", "launch.slurm.grace_s=600", "--until", "train/birds")  # fmt: skip
    run = tmp_path / "s"
    watching = start(*command, cwd=tmp_path, to=tmp_path / "watching.txt")
    until(lambda: steps(run, "seed") > 5)
    following = start("logs", "s", "seed", "-f", cwd=tmp_path, to=tmp_path / "logs.txt")
    refused = btx(*command, "train.learning_rate=0.5", cwd=tmp_path)
    assert refused[0] == 2, refused[1]  # `btx run` is there
    slurm.ask("scontrol", "update", f"JobId={job_of(run, 'seed')}", "TimeLimit=9")  # less than the grace time is left
    until(lambda: "stopped after step" in log(run, "seed"))
    slurm.ask("scontrol", "update", f"JobId={job_of(run, 'seed')}", "TimeLimit=60")
    until(lambda: "resumed after step" in log(run, "seed"))
    code, output = btx("cancel", "s", "seed", cwd=tmp_path)
    assert code == 0, output
    assert "seed (slurm, job_id" in output
    assert watching.wait(200) == 1, (tmp_path / "watching.txt").read_text()
    said = (tmp_path / "watching.txt").read_text()
    assert "seed: cancelled" in said
    assert following.wait(100) == 0
    assert "resumed after step" in (tmp_path / "logs.txt").read_text()  # it went on reading meanwhile
    until(lambda: queue(slurm) == "")
    assert states("s", tmp_path)["seed"]["state"] == "begun"

    again = start(*command, cwd=tmp_path, to=tmp_path / "again.txt")
    before = steps(run, "seed")
    until(lambda: steps(run, "seed") > before)
    again.send_signal(2)
    assert again.wait() == 130
    assert "`btx cancel s` ends them" in (tmp_path / "again.txt").read_text()
    assert states("s", tmp_path)["seed"]["state"] == "running"
    refused = btx(*command, "train.learning_rate=0.5", cwd=tmp_path)
    assert refused[0] == 2
    assert "submitted with another recipe" in refused[1]
    assert btx("cancel", "s", cwd=tmp_path)[0] == 0
    until(lambda: queue(slurm) == "")
    assert "nothing is under way" in btx("cancel", "s", cwd=tmp_path)[1]


def test_a_job_that_begins_too_early_says_so_and_one_that_is_done_ends_at_once(slurm: Cluster, tmp_path: Path) -> None:
    run = RunFolder.create(pico_recipe(tmp_path, "s"))
    work = ["srun", "--ntasks=1", sys.executable, "-m", "btx", "work", str(run.path)]
    codes = [subprocess.run([*work, stage], env=os.environ | ENVIRONMENT).returncode
             for stage in ("data/birds", "data/tokenizer", "data/tokenizer")]  # fmt: skip
    assert codes == [75, 0, 0]


@pytest.mark.parametrize("name", ["-a b", 'it\'s "q"', "$HOME%j%%", "#é*"])
def test_names_that_shells_and_slurm_take_for_something_else_are_names(
    slurm: Cluster, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    write_pico_recipe(folder)
    command = ("run", "./pico.yaml", f"run={json.dumps('./' + name)}", "launch.kind=slurm", "--until", "tokenizer")
    code, output = btx(*command, cwd=folder)
    assert code == 0, output
    assert (folder / name / "data" / "tokenizer" / "done.json").is_file()
    assert "tokenizer" in (folder / name / "logs" / "data-tokenizer.log").read_text()


def test_what_slurm_refuses_is_refused_before_anything_is_written(slurm: Cluster, tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    for setting in ("partition=nowhere", "stages.evaluate.partition=nowhere", "stages.train.gres='gpu:1'"):
        code, output = btx("run", "pico.yaml", "launch.kind=slurm", f"launch.slurm.{setting}", cwd=tmp_path)
        assert code == 2, output
        assert "Slurm refuses" in output
        assert not (tmp_path / "runs").exists()


def test_two_machines_train_one_model_as_two_processes_of_this_machine_do(slurm: Cluster, tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    processes = "launch.processes={finetune: 2}"
    run, _ = run_here(pico_recipe(tmp_path, "s", "evaluate.tasks={}"), ["data", "seed", "train", "mix"])
    shutil.copytree(run.path, tmp_path / "l")
    for name, settings in {"s": ["launch.kind=slurm", "launch.nodes={finetune: 2}"], "l": []}.items():
        code, output = btx("run", run.path / "recipe.yaml", f"run={tmp_path / name}", processes, *settings, "--until",
                           "finetune", cwd=tmp_path)  # fmt: skip
        assert code == 0, output
    assert weights(tmp_path / "s") == weights(tmp_path / "l")
    done = json.loads((tmp_path / "s" / "finetune" / "done.json").read_text())
    assert (done["processes"], done["machines"]) == (2, 2)
    spread = open_run(tmp_path / "s")
    branches_s = sum((spread.done(f"train/{domain}") or {})["wall_s"] for domain in ("birds", "tools"))
    machine_hours = models_of_run(spread)["btx"].accounting["machine_hours"]
    assert machine_hours == pytest.approx((branches_s + 2 * done["wall_s"]) / 3600)
