"""A run folder that an earlier version made goes on: what would come out the same is not trained again.

`run_of_0_1.tar.xz` is a finished run of the last version in which all data were one stage (commit 0fe69d5).
"""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest

from btx.files import read_json
from btx.recipe.loading import load_recipe
from btx.run_folder.carry_over import carry_over, is_of_earlier_version
from btx.run_folder.folder import RunFolder
from tests.pico_run import run_here

TRAINED = {"seed", "train/birds", "train/tools", "finetune", "baselines/dense_cm_domains", "baselines/dense_cm"}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old run and its data, all files with new times, in another folder than where it was made."""
    with tarfile.open(Path(__file__).with_name("run_of_0_1.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    for file in tmp_path.rglob("*.jsonl"):
        os.utime(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "old"


def carried(*overrides: str) -> tuple[dict[str, str], list[str]]:
    """State of every stage after the data were prepared anew and compared, and what was said."""
    run, lines = run_here(load_recipe("old.yaml", overrides), ["data"])
    assert is_of_earlier_version(run)
    carry_over(RunFolder(run.path, run.recipe), lines.append)
    again = RunFolder(run.path, run.recipe)
    return {stage.name: again.state(stage) for stage in again.graph}, lines


def test_what_an_earlier_version_trained_stays(old: Path) -> None:
    weights = {file: file.read_bytes() for file in old.rglob("model.safetensors")}
    states, lines = carried()
    assert {name for name, state in states.items() if state != "done"} == {"evaluate", "analyze", "report"}
    assert sum("stays, though an earlier version made it" in line for line in lines) == len(TRAINED) + 2
    later = {"analyze", "report"}
    run, lines = run_here(load_recipe("old.yaml"), [name for name in states if name not in later])
    assert {name for name in states if run.state(run.graph[name]) != "done"} == later
    assert "seed: already done, skipped" in lines
    assert {file: file.read_bytes() for file in old.rglob("model.safetensors")} == weights


def test_what_was_begun_goes_on_from_its_checkpoint(old: Path) -> None:
    (old / "train" / "tools" / "done.json").unlink()
    states, _ = carried()
    assert states["train/tools"] == "begun"
    assert states["mix"] == "stale"  # made of a branch that is not finished: it is looked at when that is
    _, lines = run_here(load_recipe("old.yaml"), ["train/tools"])
    assert any("resumed after step 8 of 8" in line for line in lines)


def test_other_tokens_are_noticed_and_told(old: Path) -> None:
    with Path("birds.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more bird"}) + "\n")
    states, lines = carried()
    assert {name for name in TRAINED if states[name] == "done"} == {"seed", "train/tools"}
    assert any(line.startswith("train/birds: has to be made anew: the tokens are others") for line in lines)


def test_other_settings_are_noticed_and_told(old: Path) -> None:
    states, lines = carried("train.learning_rate=1e-3")
    assert {name for name in TRAINED if states[name] == "done"} == {"seed"}
    assert "train/birds: has to be made anew: other settings: train" in lines
    assert read_json(old / "train" / "birds" / "done.json")["steps"] == 8  # nothing is removed
