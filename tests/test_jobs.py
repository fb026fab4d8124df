"""How many CPU threads a job gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from btx.models.device import has_bfloat16_units, in_bfloat16
from btx.planning.plan import plan
from btx.planning.speed import Speed
from btx.recipe.training import Finetune
from btx.run_folder import threads as threads_module
from btx.run_folder.folder import RunFolder
from btx.running.launchers.local import start
from btx.stages import work
from tests.pico_run import pico_recipe


@pytest.mark.parametrize(("processors", "overrides", "threads"), [
    (2, [], 1),
    (8, [], 4),
    (8, ["launch.jobs=1"], 8),
    (1, [], 1),
    (8, ["launch.threads=3"], 3),
])  # fmt: skip
def test_branches_share_the_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processors: int, overrides: list[str], threads: int
) -> None:
    monkeypatch.setattr(threads_module, "processors", lambda: processors)
    run = RunFolder(tmp_path / "run", pico_recipe(tmp_path, "run", *overrides))
    assert threads_module.training_threads(run.graph) == threads
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads_module.threads_of(run.graph, run.graph["train/birds"]) == threads
    assert threads_module.threads_of(run.graph, run.graph["seed"]) == processors
    hours = [next(row["hours"] for row in plan(run.recipe, speed=Speed(1e9, "", threads=count))["stages"]
                  if row["stage"] == "train/birds") for count in (threads, 2 * threads)]  # fmt: skip
    assert hours[1] == pytest.approx(2 * hours[0])  # the same speed from twice the threads: half of it for a branch


def test_only_processors_this_process_may_use_are_counted() -> None:
    assert threads_module.processors() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("asked_for", "threads"), [("3", 3), ("3,2", 3), ("", 7), ("many", 7), ("0", 7)])
def test_of_omp_num_threads_the_outermost_level_counts(
    monkeypatch: pytest.MonkeyPatch, asked_for: str, threads: int
) -> None:
    monkeypatch.setattr(threads_module, "processors", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", asked_for)
    assert threads_module.threads_alone() == threads


def test_a_stage_that_runs_alone_takes_all_processors_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads_module, "processors", lambda: before + 1)
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        work.use_all_processors()
        assert torch.get_num_threads() == before
        monkeypatch.delenv("OMP_NUM_THREADS")
        work.use_all_processors()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_bfloat16_is_for_processors_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda there=there: {"avx2": True, "avx512_bf16": there})
        assert has_bfloat16_units() == there
        assert in_bfloat16("bfloat16", torch.device("cpu")) == there
        assert in_bfloat16("bfloat16", torch.device("cuda"))


def test_auto_is_bfloat16_on_gpus_that_have_units_for_it_and_float32_on_every_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Finetune(tokens=1).precision == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for there in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda there=there: {"avx512_bf16": there})
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, there=there: there)
        assert in_bfloat16("auto", torch.device("cuda")) == there
        assert not in_bfloat16("auto", torch.device("cpu"))
        assert not in_bfloat16("float32", torch.device("cuda"))


def test_a_job_imports_nothing_from_where_btx_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("yaml", "datasets", "safetensors"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working folder')\n")
    monkeypatch.chdir(tmp_path)
    job = start(["status", "no-such-run"], tmp_path / "job.log")
    job.wait()
    assert "no-such-run: this is no run folder" in (tmp_path / "job.log").read_text("utf-8")
