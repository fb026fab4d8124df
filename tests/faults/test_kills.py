"""kill -9 at any moment of any stage: run again, it ends bit for bit as if nothing had been, and nothing finished is
lost."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from btx.files import file_sha256
from btx.outputs import damage, read_done
from btx.run_folder.folder import RunFolder
from tests.faults.kills import outcome, work_counted, work_killed
from tests.pico_run import pico_recipe
from tests.processes import start, start_btx

SMALL = ("seed_model.train.tokens=768", "train.tokens=512", "finetune.tokens=512", "evaluate.tokens=200",
         "evaluate.tasks={}", "analyze.tokens=100", "seed_model.train.checkpoint_every=1")  # fmt: skip
"""Trains in two or three steps."""
CASES = [
    pytest.param("mix", 0, marks=pytest.mark.long, id="mix"),
    *(pytest.param("report", seed, marks=pytest.mark.chaos, id=f"report-{seed}") for seed in range(12)),
]
"""Up to which stage, and the rng seed that says at which change each stage is killed."""
KILLED = {"mix": ["data/birds", "train/birds", "mix"]}
"""Stages killed where not all are: every process that is killed costs a second."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[RunFolder, Any, dict[str, int]]]:
    """Of a run up to a stage: what it comes to when nothing disturbs it, and how often each stage changes something.

    Its folder is empty again: a mix notes where its models were, so all runs are made in the same place.
    """

    @cache
    def made(until: str) -> tuple[RunFolder, Any, dict[str, int]]:
        folder = tmp_path_factory.mktemp("killed")
        run = RunFolder.create(pico_recipe(folder, "run", *SMALL))
        work = start(work_counted, str(run.path), *names(run, until), log=folder / "log")
        work.join()
        assert work.exitcode == 0, (folder / "log").read_text()
        came_to, changes = outcome(run), json.loads((folder / "changes.json").read_text())
        shutil.rmtree(run.path)
        return run, came_to, changes

    return made


def names(run: RunFolder, until: str) -> list[str]:
    stages = [stage.name for stage in run.graph]
    return stages[: stages.index(until) + 1]


def finished(run: RunFolder) -> dict[str, str]:
    """done.json of every finished stage, whose files are all as it left them."""
    stages = [stage for stage in run.graph if read_done(run.folder(stage.name))]
    assert not [problem for stage in stages if (problem := damage(run.folder(stage.name), "whole"))]
    return {stage.name: file_sha256(run.folder(stage.name) / "done.json") for stage in stages}


@pytest.mark.parametrize(("until", "rng_seed"), CASES)
def test_killed_once_in_every_stage_a_run_ends_as_if_it_had_not_been(
    undisturbed: Callable[[str], tuple[RunFolder, Any, dict[str, int]]], tmp_path: Path, until: str, rng_seed: int
) -> None:
    run, came_to, changes = undisturbed(until)
    shutil.rmtree(run.path, ignore_errors=True)
    RunFolder.create(run.recipe)
    stages = names(run, until)
    assert changes.keys() == set(stages)
    chance, before, log = random.Random(rng_seed), dict[str, str](), tmp_path / "log"
    for stage in KILLED.get(until, stages):
        at = chance.randint(1, changes[stage])
        killed = start(work_killed, str(run.path), stage, at, *stages, log=log)
        killed.join()
        assert killed.exitcode == -signal.SIGKILL, (stage, at, log.read_text())
        now = finished(RunFolder(run.path, run.recipe))
        assert now.items() >= before.items(), f"lost by a kill in {stage} before its change {at}"
        before = now
    last = start_btx("work", run.path, *stages, log=log)
    last.join()
    assert last.exitcode == 0, log.read_text()
    assert outcome(RunFolder(run.path, run.recipe)) == came_to
    assert not [path for path in run.path.rglob(".*") if path.name.endswith((".tmp", ".making", ".replaced"))]
