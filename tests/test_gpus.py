"""Which job sees which GPUs of a machine; there are none here, so what is said of them stands for some."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

from btx.run_folder.stages_of_recipe import build_graph
from btx.run_folder.threads import jobs_at_once
from btx.running import gpus, pipeline
from btx.running.gpus import VISIBLE, Gpus
from btx.running.launch_texts import launch_text
from btx.running.launchers import local
from btx.sweeps import starting
from btx.sweeps.variants import plan_sweep
from tests.pico_run import pico_recipe, write_pico_recipe

STUB = """#!/bin/bash
[[ $1 == work ]] || exit 0
echo "$3 starts ${CUDA_VISIBLE_DEVICES-all}" >>"$LOG"
[[ $3 == train/* || $3 == mix || $3 == baselines/* ]] && sleep 0.5
echo "$3 ends" >>"$LOG"
"""
"""In place of btx in a script: says when a job works and what it sees."""


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had two; the jobs themselves have the CPU, whatever they are let see."""
    for module in (local, pipeline, starting):
        monkeypatch.setattr(module, "gpus_of", lambda device: () if device == "cpu" else ("0", "1"))


def test_gpus_are_given_to_the_job_that_is_next_those_first_that_the_fewest_have() -> None:
    four = Gpus(["a", "b", "c", "d"])
    for process, expected in enumerate(["a", "b", "c", "d", "a"]):
        assert four.variables(1) == {VISIBLE: expected}
        four.take(process, four.variables(1))
    four.give_back(2)
    four.give_back(2)
    four.give_back(99)
    assert four.variables(1) == {VISIBLE: "c"}
    assert four.variables(2) == {VISIBLE: "b,c"}
    assert four.variables(4) == {}
    assert four.variables(8) == {}, "what is missing is said by the job"
    assert Gpus([]).variables(1) == Gpus(["0"]).variables(1) == {}


@pytest.mark.parametrize(("visible", "there", "expected"), [
    (None, 3, ("0", "1", "2")), ("4, 6", 2, ("4", "6")), ("", 0, ()), ("-1", 0, ()), ("GPU-12ab", 1, ("GPU-12ab",)),
])  # fmt: skip
def test_the_gpus_of_a_machine_are_those_that_torch_sees(
    visible: str | None, there: int, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "SIGNS", (os.devnull,))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.delenv(VISIBLE, raising=False)
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    assert gpus.gpus_here.__wrapped__() == expected


def test_a_machine_without_a_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "SIGNS", ("/dev/no-such-driver",))
    assert gpus.gpus_here.__wrapped__() == ()
    assert gpus.gpus_of("cpu") == ()


@pytest.mark.parametrize(("overrides", "gpus_here", "at_once"), [
    ([], 0, 2), ([], 1, 1), ([], 2, 2), ([], 8, 4), (["launch.jobs=3"], 1, 3), (["launch.processes=2"], 0, 1),
    (["launch.processes=2"], 1, 1), (["launch.processes=2"], 5, 2), (["launch.processes={finetune: 4}"], 4, 4),
    (["launch.processes={train: 2}"], 1, 1),
])  # fmt: skip
def test_as_many_jobs_at_once_as_gpus_hold(overrides: list[str], gpus_here: int, at_once: int, tmp_path: Path) -> None:
    baselines = "baselines=[dense_dm,btx_soft,upcycling_dm]"
    assert jobs_at_once(build_graph(pico_recipe(tmp_path, "run", baselines, *overrides)), gpus_here) == at_once


@pytest.mark.usefixtures("two_gpus")
def test_each_job_that_trains_has_gpus_of_its_own_and_the_others_see_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = count(1)
    ended: dict[int, int] = {}

    class Started:
        def __init__(self) -> None:
            self.pid = next(processes)

        def exit_code(self) -> int | None:
            return ended.get(self.pid)

    monkeypatch.setattr(local, "start", lambda arguments, log, variables: Started())
    recipe = pico_recipe(tmp_path, "run", "device=auto", "launch.processes={align: 2}")
    launcher = local.LocalLauncher(recipe.launch, recipe.device)
    jobs = [["data/birds"], ["train/birds"], ["train/tools"], ["mix", "finetune"], ["evaluate"], ["align/sft"]]
    handles = [launcher.submit(tmp_path, stages, tmp_path / "log") for stages in jobs]
    assert [handle.get("gpus") for handle in handles] == [None, "0", "1", "0", None, None]
    assert (recipe.launch.gpus_of(["mix"]), recipe.launch.gpus_of(["evaluate"])) == (1, 0)
    ended |= {2: 0, 4: 1}
    launcher.poll(handles)
    assert launcher.submit(tmp_path, ["baselines/dense_dm"], tmp_path / "log")["gpus"] == "0"
    assert "gpus" not in local.LocalLauncher(recipe.launch, "cpu").submit(tmp_path, ["seed"], tmp_path / "log")


@pytest.mark.usefixtures("two_gpus")
def test_a_job_that_an_earlier_run_has_left_keeps_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Started:
        pid = 7

        def exit_code(self) -> None:
            """It still runs."""

    monkeypatch.setattr(local, "start", lambda arguments, log, variables: Started())
    launch = pico_recipe(tmp_path, "run", "device=auto").launch
    left = {"pid": 1, "born": 1.0, "node": "here", "gpus": "0"}
    for lives, gpu in ((True, "1"), (False, "0")):
        monkeypatch.setattr(local, "_lives", lambda handle, lives=lives: lives)
        launcher = local.LocalLauncher(launch, "auto")
        for _ in range(3):
            launcher.poll([left])
        assert launcher.submit(tmp_path, ["train/birds"], tmp_path / "log")["gpus"] == gpu


@pytest.mark.long
@pytest.mark.usefixtures("two_gpus")
def test_branches_side_by_side_have_a_gpu_each(tmp_path: Path) -> None:
    run = pipeline.run(pico_recipe(tmp_path, "run", "device=auto", "launch.jobs=null"), until="train")
    lines = [json.loads(line) for line in (run.path / "events.jsonl").read_text("utf-8").splitlines()]
    seen = {line["job"]: line.get("gpus") for line in lines if line["event"] == "start"}
    assert {seen["train/birds"], seen["train/tools"]} == {"0", "1"}
    assert seen["data/birds"] is None


@pytest.mark.usefixtures("two_gpus")
def test_runs_of_a_sweep_share_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []

    class Ended:
        pid = property(lambda self: 7)

        def exit_code(self) -> None:
            """It still runs."""

    monkeypatch.setattr(starting, "start_run", lambda run, log, variables: started.append(variables) or Ended())
    planned = plan_sweep(str(write_pico_recipe(tmp_path)), [f"data.root={tmp_path}", "device=auto"], jobs=2)
    for jobs, expected in ((1, [None, None]), (2, ["0", "1"])):
        start = starting.starter(jobs)
        for run in planned.runs[:2]:
            start(run, tmp_path / "log")
        assert [variables.get(VISIBLE) for variables in started[-2:]] == expected


@pytest.mark.usefixtures("two_gpus")
def test_runs_of_a_sweep_that_train_elsewhere_or_on_the_cpu_are_given_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, str]] = []

    class Running:
        pid = property(lambda self: len(started))

        def exit_code(self) -> None:
            """It still runs."""

    monkeypatch.setattr(starting, "start_run", lambda run, log, variables: started.append(variables) or Running())
    start = starting.starter(2)
    for given in (["launch.kind=slurm"], ["device=cpu"], [], ["device=cpu"], []):
        planned = plan_sweep(str(write_pico_recipe(tmp_path)), [f"data.root={tmp_path}", "device=auto", *given], jobs=2)
        start(planned.runs[0], tmp_path / "log")
    assert [variables.get(VISIBLE) for variables in started] == [None, None, "0", None, "1"]


@pytest.fixture
def seen_by_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs the shell script of a recipe with the stub on a machine with so many GPUs, or with such an nvidia-smi;
    returns what it said."""

    def run(gpus_here: int | str, *overrides: str, visible: str | None = None) -> list[str]:
        program = gpus_here if isinstance(gpus_here, str) else f"seq 0 {gpus_here - 1}"
        recipe = pico_recipe(tmp_path, "run", "device=auto", "baselines=[dense_dm]", *overrides)
        stub, log, tools = tmp_path / "stub", tmp_path / "log", tmp_path / "bin"
        tools.mkdir(exist_ok=True)
        for file, text in ((stub, STUB), (tools / "nvidia-smi", f"#!/bin/sh\n{program}\n")):
            file.write_text(text, "utf-8")
            file.chmod(0o755)
        text = re.sub(r"(?m)^btx=\(.*\)$", f"btx=({stub})", launch_text(recipe, "shell")["run.sh"])
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        monkeypatch.setenv("LOG", str(log))
        monkeypatch.delenv(VISIBLE, raising=False)
        if visible is not None:
            monkeypatch.setenv(VISIBLE, visible)
        log.unlink(missing_ok=True)
        subprocess.run(["bash", "-c", text], check=True, capture_output=True, cwd=tmp_path, timeout=60)
        return log.read_text("utf-8").splitlines()

    return run


def together(lines: list[str]) -> int:
    """Most jobs that train at the same time."""
    most, working = 0, set[str]()
    for line in lines:
        job, what = line.split()[:2]
        if job.startswith(("train/", "baselines/")) or job == "mix":
            (working.add if what == "starts" else working.discard)(job)
        most = max(most, len(working))
    return most


@pytest.mark.long
def test_a_shell_script_gives_each_job_a_gpu(seen_by_script: Callable[..., list[str]]) -> None:
    one, two = seen_by_script(1), seen_by_script(2)
    assert together(one) == 1
    assert all(line.endswith("all") for line in one if " starts " in line), "of one there is nothing to choose"
    assert together(two) == 2
    visible = dict(re.fullmatch(r"(.*) starts (.*)", line).groups() for line in two if " starts " in line)
    assert {visible["train/birds"], visible["train/tools"]} == {"0", "1"}
    assert {visible["data/birds"], visible["evaluate"]} == {"all"}
    assert together(seen_by_script(1, "launch.jobs=2")) == 2
    assert together(seen_by_script(3, "launch.processes=2")) == 1


@pytest.mark.parametrize("given", ["launch.jobs=null", "launch.jobs=2"])
def test_in_a_shell_script_branches_have_gpus_of_their_own_beside_a_wide_finetuning(
    seen_by_script: Callable[..., list[str]], given: str
) -> None:
    lines = seen_by_script(2, given, "launch.processes={finetune: 2}")
    visible = dict(re.fullmatch(r"(.*) starts (.*)", line).groups() for line in lines if " starts " in line)
    assert {visible["train/birds"], visible["train/tools"]} == {"0", "1"}
    assert visible["mix"] == "all"
    assert together(lines) == 2


@pytest.mark.parametrize(("program", "visible"), [
    ("echo NVIDIA-SMI has failed because it could not communicate with the driver; exit 9", None), ("exit 127", None),
    ("echo No devices were found", None), ("seq 0 7", "-1"), ("seq 0 7", ""), ("seq 0 7", " "),
])  # fmt: skip
def test_a_shell_script_takes_no_message_for_a_gpu(
    seen_by_script: Callable[..., list[str]], program: str, visible: str | None
) -> None:
    lines = seen_by_script(program, "launch.jobs=null", visible=visible)
    assert {line.partition(" starts ")[2] for line in lines if " starts " in line} == {
        "all" if visible is None else visible
    }
    assert together(lines) == 2, "as on a machine without"


def test_a_shell_script_keeps_to_the_gpus_it_is_let_see(seen_by_script: Callable[..., list[str]]) -> None:
    lines = seen_by_script("seq 0 7", "launch.jobs=null", visible="GPU-5, GPU-1")
    seen = {line.partition(" starts ")[2] for line in lines if line.startswith("train/") and " starts " in line}
    assert seen == {"GPU-5", "GPU-1"}
