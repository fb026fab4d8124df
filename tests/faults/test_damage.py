"""What is damaged or changes, before it is used or while it is: named, nothing is made from it, and what is right again
goes on bit for bit."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from btx.errors import DataError, RunFolderError, StageFailed, UserError
from btx.evaluation.harness_files import TaskRequest
from btx.files import file_sha256
from btx.mixing.drop import drop
from btx.mixing.extend import extend
from btx.mixing.mix import mix, soup
from btx.process import Interrupts
from btx.run_folder.folder import RunFolder
from btx.running.launchers import START
from btx.running.pipeline import run as run_pipeline
from btx.serving.speaker import Speaker
from btx.stages.adopt import adopt
from btx.stages.one_task import evaluate_task
from btx.stages.work import run_stages
from tests.pico_run import pico_recipe, run_here
from tests.processes import ForkedLauncher, btx, start
from tests.test_outputs import flip

SMALL = ("seed_model.train.tokens=512", "finetune.tokens=512", "baselines=[btm_top2]")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run up to its mix and Branch-Train-Merge; nobody may change it."""
    recipe = pico_recipe(tmp_path_factory.mktemp("damage"), "run", *SMALL)
    return run_here(recipe, ["data", "seed", "train", "mix", "baselines"])[0]


@pytest.fixture
def run(mixed: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(mixed.path, tmp_path / "run")
    return RunFolder(tmp_path / "run", mixed.recipe)


def by_hand(run: RunFolder, out: Path) -> dict[str, Callable[[], Any]]:
    """Everything that reads an expert's folder of a run, or the mix's, without being a stage of it."""
    birds, tools, moe = run.model("train/birds"), run.model("train/tools"), run.model("mix")
    task, ask = TaskRequest("quiz", "arc_easy", None, None, None, None), {"allow_code_execution": False, "log": print}
    return {
        "btx mix": lambda: mix(run.model("seed"), {"birds": birds, "tools": tools}, out),
        "btx.soup": lambda: soup(run.model("seed"), {"birds": birds, "tools": tools}, out),
        "btx extend": lambda: extend(moe, "law", birds, out),
        "btx extend of the mix": lambda: extend(moe, "law", tools, out),
        "btx drop": lambda: drop(moe, "birds", out),
        "btx adopt": lambda: adopt(run, "tools", birds, print),
        "btx chat": lambda: Speaker(birds),
        "btx chat with Branch-Train-Merge": lambda: Speaker(run.model("baselines/btm_top2")),
        "btx evaluate --task": lambda: evaluate_task(birds, task, **ask),
    }


@pytest.mark.parametrize("what", by_hand(RunFolder(Path(), None), Path()).keys())  # type: ignore[arg-type]
def test_a_finished_models_damage_is_noticed_by_whoever_uses_it(run: RunFolder, tmp_path: Path, what: str) -> None:
    damaged = run.model("mix" if what in ("btx drop", "btx extend of the mix") else "train/birds") / WEIGHTS
    flip(damaged)
    with pytest.raises(UserError, match=re.escape(f"{damaged}: its bytes are others than those that were written")):
        by_hand(run, tmp_path / "out")[what]()
    assert not (tmp_path / "out").exists()


class Then(Interrupts):
    """Does something when a stage has come so far: after a step, or a block of a file."""

    def __init__(self, after: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.left, self.act = after, act

    def raise_if_pending(self, message: str) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()


def again(run: RunFolder) -> RunFolder:
    return RunFolder(run.path, run.recipe)


def test_tokens_that_change_while_they_are_trained_on_are_in_no_checkpoint(run: RunFolder) -> None:
    whole = file_sha256(run.model("train/birds") / WEIGHTS)
    shutil.rmtree(run.folder("train/birds"))
    tokens = run.folder("data/birds") / "0" / "train" / "tokens.bin"
    with pytest.raises(RunFolderError, match=re.escape(f"{tokens}: its bytes are others")):
        run_stages(again(run), ["train/birds"], Then(4, lambda: flip(tokens)), print)
    assert [path.name for path in (run.folder("train/birds") / "state").iterdir()] == ["step-00000003"]
    flip(tokens)
    said: list[str] = []
    run_stages(again(run), ["train/birds"], Interrupts(), said.append)
    assert "resumed after step 3 of 8" in said
    assert file_sha256(run.model("train/birds") / WEIGHTS) == whole


def test_an_expert_that_changes_while_it_is_mixed_makes_no_mix(run: RunFolder) -> None:
    expert = run.model("train/birds") / WEIGHTS
    whole = {name: file_sha256(run.model(name) / WEIGHTS) for name in ("mix", "train/birds")}
    shutil.rmtree(run.folder("mix"))
    with pytest.raises(RunFolderError, match=re.escape(f"{expert}: its bytes are others")):
        run_stages(again(run), ["mix"], Then(1, lambda: flip(expert)), print)
    assert not list(run.path.glob("*mix*"))
    flip(expert)
    run_stages(again(run), ["mix"], Interrupts(), print)
    assert {name: file_sha256(run.model(name) / WEIGHTS) for name in whole} == whole


def test_a_data_file_that_changes_while_it_is_read_makes_no_tokens(tmp_path: Path) -> None:
    recipe, file = pico_recipe(tmp_path), tmp_path / "birds.jsonl"
    text = file.read_text()

    def log(line: str) -> None:
        if line.startswith("birds/0: "):
            file.write_text(text + text.replace("heron", "hawk"))

    run = RunFolder.create(recipe)
    with pytest.raises(DataError, match=r"birds\.jsonl changed while it was read; run the same command again"):
        run_stages(run, ["data/tokenizer", "data/birds"], Interrupts(), log)
    assert not list((run.path / "data").glob("*birds*"))
    file.write_text(text)
    run_stages(RunFolder(run.path, recipe), ["data/birds"], Interrupts(), print)


def cutting(*arguments: str) -> None:
    """A job under which the tokens are cut off in its third step."""
    from btx.training import step

    steps = step.at_step

    def at_step(model: Any, number: int) -> None:
        steps(model, number)
        if number == 3:
            os.truncate(Path(arguments[0]) / "data" / "birds" / "0" / "train" / "tokens.bin", 0)

    step.at_step = at_step
    btx("work", *arguments)


class Cutting(ForkedLauncher):
    """Starts such jobs."""

    def forked(self, run: Path, stages: Sequence[str], log: Path) -> BaseProcess:
        return start(cutting, str(run), *stages, log=log)


@pytest.mark.long
def test_a_file_cut_off_while_it_is_mapped_ends_the_job_and_is_named_at_the_next_start(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run.folder("train/birds"))
    recipe = run.recipe.model_copy(update={"run": str(run.path)})
    monkeypatch.setitem(START, "local", Cutting)
    with pytest.raises(
        StageFailed, match=rf"(?s)train/birds failed \(signal {signal.SIGBUS:d}\).*cut off while it was"
    ):
        run_pipeline(recipe, until="train")
    with pytest.raises(RunFolderError, match=r"data/birds/0/train/tokens\.bin: has 0 bytes instead of"):
        run_pipeline(recipe, until="train")
