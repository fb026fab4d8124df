"""Runs on Ray: a cluster of two nodes, and a Ray of the run's own. Marked `ray`: needs minutes, Ray and root."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from btx.errors import UserError
from btx.files import file_sha256
from btx.metrics_file import last_metrics
from btx.recipe.launch import Launch
from btx.running.launchers.local import LocalLauncher
from btx.running.launchers.ray import RayLauncher
from tests.pico_run import pico_recipe, run_here, write_pico_recipe
from tests.ray_cluster import ADDRESS, NETWORK, VARIABLES, RayCluster, missing, ray_cluster

LONG = ["data.root=.", "train.tokens=76800", "finetune.tokens=12800", "baselines=[]", "evaluate.tasks={}",
        "launch.threads=1"]  # fmt: skip
"""Branches of 300 steps."""
BRANCHES = ("train/birds", "train/tools")
PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    write_pico_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    """SHA-256 of the final model of a run in this process."""
    return final_model(run_here(pico_recipe(folder, "here", *LONG[1:]))[0].path)


@pytest.fixture
def cluster(folder: Path, tmp_path: Path) -> Iterator[RayCluster]:
    with ray_cluster(tmp_path / "ray.log") as cluster:
        yield cluster


def final_model(run: Path) -> str:
    return file_sha256(run / "finetune" / "model" / "model.safetensors")


def wait_until(holds: Callable[[], bool], what: str) -> None:
    since = time.monotonic()
    while not holds():
        assert time.monotonic() - since < PATIENCE_S, what
        time.sleep(0.05)


def step(run: Path, stage: str) -> int:
    return int((last_metrics(run / stage / "metrics.jsonl") or {"step": 0})["step"])


def workers(run: Path) -> list[psutil.Process]:
    """The processes of a run's jobs."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "work" in (command := process.cmdline()) and run.name in command and process.cwd() == str(run.parent):
                found.append(process)
    return found


def start_run(folder: Path, prefix: list[str], *overrides: str) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-m", "btx", "run", "pico.yaml", *LONG, "launch.kind=ray", *overrides]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | VARIABLES)  # fmt: skip


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_run_on_two_nodes_survives_its_coordinator_and_a_node_and_gives_the_same_weights(
    cluster: RayCluster, folder: Path, expected: str
) -> None:
    run, on_cluster = folder / "far", [f"launch.ray.address={ADDRESS}", "launch.retries=1", "run=far"]
    first = start_run(folder, cluster.command(), *on_cluster)
    wait_until(lambda: all(step(run, branch) >= 5 for branch in BRANCHES), "the branches train side by side")
    first.kill()
    assert "train/birds: submitted (ray, " in first.communicate()[0]
    second = start_run(folder, cluster.command(), *on_cluster)
    before = {branch: step(run, branch) for branch in BRANCHES}
    wait_until(lambda: all(step(run, branch) > before[branch] for branch in BRANCHES), "jobs go on alone")
    cluster.kill_node(cluster.nodes[1])
    said = second.communicate(timeout=PATIENCE_S * 2)[0]
    assert second.returncode == 0, said
    assert said.count("submitted before (ray, ") == 2
    assert said.count("; tried again, 1 of 1") == 1
    assert final_model(run) == expected
    assert not list((run / "jobs").glob("*"))


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_ctrl_c_stops_watching_and_a_job_that_is_cancelled_saves(
    cluster: RayCluster, folder: Path, expected: str
) -> None:
    run, on_cluster = folder / "cancelled", [f"launch.ray.address={ADDRESS}", "run=cancelled"]
    watching = start_run(folder, cluster.command(), *on_cluster)
    wait_until(lambda: all(step(run, branch) >= 5 for branch in BRANCHES), "the branches train side by side")
    watching.send_signal(signal.SIGINT)
    said = watching.communicate(timeout=PATIENCE_S)[0]
    assert watching.returncode == 130, said
    assert "stopped watching; train/birds, train/tools go on" in said
    before = {branch: step(run, branch) for branch in BRANCHES}
    wait_until(lambda: all(step(run, branch) > before[branch] for branch in BRANCHES), "jobs go on alone")
    command = cluster.command(sys.executable, "-m", "btx", "cancel", str(run))
    asked = subprocess.run(command, capture_output=True, text=True, env=os.environ | VARIABLES)
    assert "asked to save and end: train/" in asked.stdout, asked.stderr
    wait_until(lambda: not workers(run), "the jobs end")
    for branch in BRANCHES:
        saved = [int(path.name.removeprefix("step-")) for path in (run / branch / "state").glob("step-*")]
        assert step(run, branch) in saved, "nothing of it is lost"
    again = start_run(folder, cluster.command(), *on_cluster)
    said = again.communicate(timeout=PATIENCE_S * 2)[0]
    assert again.returncode == 0, said
    assert final_model(run) == expected


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_ray_of_its_own_ends_with_the_run_even_if_that_is_killed_and_jobs_save(folder: Path, expected: str) -> None:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    run = folder / "own"
    killed = start_run(folder, list(NETWORK), "run=own")
    wait_until(lambda: all(step(run, branch) >= 5 for branch in BRANCHES), "the branches train side by side")
    others = psutil.Process(killed.pid).children(recursive=True)
    assert any("raylet" in process.name() for process in others)
    killed.kill()
    killed.communicate()
    wait_until(lambda: not any(process.is_running() for process in others), "Ray ends, and its jobs")
    for branch in BRANCHES:
        saved = [int(path.name.removeprefix("step-")) for path in (run / branch / "state").glob("step-*")]
        assert step(run, branch) in saved, "nothing of it is lost"
    again = start_run(folder, list(NETWORK), "run=own")
    said = again.communicate(timeout=PATIENCE_S * 2)[0]
    assert again.returncode == 0, said
    assert final_model(run) == expected


# Without Ray


def test_without_ray_a_run_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btx.running.launchers.ray.find_spec", lambda name: None)
    from btx.running.pipeline import run

    with pytest.raises(UserError, match=r'pip install "branchtrainmix\[ray\]"'):
        run(pico_recipe(tmp_path, "run", "launch.kind=ray"))
    assert not (tmp_path / "run").exists()


def test_a_job_of_ray_or_of_this_machine_has_one_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("btx.running.launchers.ray.find_spec", lambda name: True)
    for kind, launcher in {"ray": RayLauncher, "local": partial(LocalLauncher, device="cpu")}.items():
        started = launcher(Launch.model_validate({"kind": kind, "nodes": {"finetune": 2}, "processes": 2}))
        started.check(Path("run"), [["train/birds"]])
        with pytest.raises(UserError, match=r"launch\.nodes: 2 for finetune: .*launch\.kind=slurm"):
            started.check(Path("run"), [["train/birds"], ["finetune"]])


@pytest.mark.parametrize(("stage", "cpus", "gpus", "resources"), [
    ("data/birds", 2, None, {"disk": 1}),
    ("train/birds", 2, 1, {"disk": 1}),
    ("finetune", 8, 0.5, {}),
])  # fmt: skip
def test_a_job_claims_what_its_kind_says_and_else_what_is_said_for_all(
    stage: str, cpus: float, gpus: float | None, resources: dict[str, float]
) -> None:
    finetune = {"cpus": 8, "gpus": 0.5, "resources": {}}
    ray = {"cpus": 2, "gpus": 1, "resources": {"disk": 1}, "stages": {"finetune": finetune}}
    job = Launch.model_validate({"ray": ray}).ray_of(stage)
    assert (job.cpus, job.gpus, job.resources) == (cpus, gpus, resources)
