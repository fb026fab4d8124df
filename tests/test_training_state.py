"""Which checkpoints a training goes on from, and which it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from btx.errors import RunFolderError
from btx.files import read_json, write_json
from btx.recipe.training import Training
from btx.training.optimizer import adamw
from btx.training.state import StateFolder
from tests.pico_run import pico_recipe, run_here

MARKS = {"inputs": "i", "data": "d"}


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A matrix after some steps on its own sum of squares."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = adamw(model, Training(tokens=1, learning_rate=0.1))
    for _ in range(steps):
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def saved(folder: StateFolder, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Save and wait until the checkpoint is written."""
    folder.save(step, model, optimizer)
    folder.close()


def test_a_checkpoint_restores_weights_and_moments(tmp_path: Path) -> None:
    whole, optimizer = trained(4)
    saved(StateFolder(tmp_path / "state", MARKS), 4, whole, optimizer)
    fresh, its_optimizer = trained(0)
    assert StateFolder(tmp_path / "state", MARKS).load(fresh, its_optimizer) == 4
    for parameter, restored in zip(whole.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(parameter, restored)
        kept, found = optimizer.state[parameter], its_optimizer.state[restored]
        assert kept.keys() == found.keys()
        assert all(torch.equal(kept[moment], found[moment]) for moment in kept)


def test_without_a_checkpoint_nothing_is_done_yet(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state", MARKS)
    assert (folder.load(*trained(0)), folder.last()) == (0, "none yet")


@pytest.mark.parametrize(("other", "named"), [
    ({"inputs": "i", "data": "e"}, "other data;"),
    ({"inputs": "j", "data": "d"}, "other inputs;"),
    ({"inputs": "j", "data": "e"}, "other inputs, data;"),
])  # fmt: skip
def test_a_checkpoint_of_other_data_or_inputs_is_refused(tmp_path: Path, other: dict[str, str], named: str) -> None:
    saved(StateFolder(tmp_path / "state", MARKS), 4, *trained(4))
    fresh, optimizer = trained(0)
    before = [parameter.detach().clone() for parameter in fresh.parameters()]
    with pytest.raises(RunFolderError, match=f"step-00000004: made with {named} resuming would mix old and new"):
        StateFolder(tmp_path / "state", other).load(fresh, optimizer)
    assert all(map(torch.equal, before, fresh.parameters()))
    assert not optimizer.state


@pytest.mark.parametrize("mark", ["inputs", pytest.param("data", marks=pytest.mark.long)])
def test_a_stage_refuses_a_checkpoint_of_its_own_folder_that_another_training_left(tmp_path: Path, mark: str) -> None:
    recipe = pico_recipe(tmp_path)
    run, _ = run_here(recipe, ["data", "seed"])
    done = run.folder("seed") / "done.json"
    (state,) = run.folder("seed").glob("state/*/state.json")
    written = read_json(state)
    assert written["marks"] == {"inputs": run.graph["seed"].inputs, "data": read_json(done)["data"]}
    done.unlink()
    write_json(state, written | {"marks": written["marks"] | {mark: "another"}})
    with pytest.raises(RunFolderError, match=f"made with other {mark}; .* remove .*seed to train anew"):
        run_here(recipe, ["seed"])


def a_digit(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 2', '"step": 1'))


def a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("file", "harm", "why"), [
    ("state.json", a_digit, "state.json: changed since btx wrote it"),
    ("state.json", Path.unlink, "state.json: there is no such file"),
    ("state.json", lambda path: path.write_text("{}"), "state.json: step: field required"),
    ("weights.safetensors", a_byte, "weights.safetensors: its bytes are others"),
    ("optimizer.safetensors", Path.unlink, "optimizer.safetensors: there is no such file"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_and_said_and_without_a_whole_one_nothing_starts_anew(
    tmp_path: Path, file: str, harm: Callable[[Path], None], why: str
) -> None:
    lines: list[str] = []
    folder = StateFolder(tmp_path / "state", MARKS, log=lines.append)
    for step in (1, 2):
        saved(folder, step, *trained(step))
    harm(tmp_path / "state" / "step-00000002" / file)
    fresh, optimizer = trained(0)
    assert folder.load(fresh, optimizer) == 1
    assert torch.equal(fresh.weight, trained(1)[0].weight)  # type: ignore[arg-type]
    assert len(lines) == 1
    assert f"step-00000002/{why}" in lines[0]
    (tmp_path / "state" / "step-00000001").rename(tmp_path / "state" / "step-00000003")
    with pytest.raises(RunFolderError, match=r"no checkpoint is whole: .*step-00000003.*: it is of step 1; .*00000002"):
        folder.load(fresh, optimizer)


def test_a_damaged_checkpoint_that_was_passed_over_counts_for_none(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state", MARKS)
    for step in (1, 9):
        saved(folder, step, *trained(step))
    a_byte(folder.folder / "step-00000009" / "weights.safetensors")
    resumed = StateFolder(tmp_path / "state", MARKS)
    assert resumed.load(*trained(0)) == 1
    assert resumed.last().endswith("step-00000001")
    parts, kept = trained(1), []
    for step in (2, 3, 9):
        saved(resumed, step, *parts)
        kept.append(sorted(int(path.name[5:]) for path in resumed.folder.iterdir()))
    assert kept == [[1, 2, 9], [2, 3, 9], [3, 9]]
    assert resumed.last().endswith("step-00000009")
    assert StateFolder(tmp_path / "state", MARKS).load(*trained(0)) == 9


def test_a_finished_training_whose_metrics_are_gone_says_so(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path)
    run, _ = run_here(recipe, ["data", "seed"])
    for file in ("done.json", "metrics.jsonl"):
        (run.folder("seed") / file).unlink()
    with pytest.raises(RunFolderError, match=r"seed/metrics.jsonl: .* none of the 10 steps .* remove .*seed to train"):
        run_here(recipe, ["seed"])


@pytest.mark.parametrize(("later", "told"), [('{"step": 2}\n', 0), ("", 0), ("changed", 1)])
def test_metrics_that_changed_since_the_checkpoint_are_told(tmp_path: Path, later: str, told: int) -> None:
    lines: list[str] = []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    folder = StateFolder(tmp_path / "state", MARKS, log=lines.append)
    saved(folder, 1, *trained(1))
    (tmp_path / "metrics.jsonl").write_text(later if told else f'{{"step": 1}}\n{later}')
    assert folder.load(*trained(0)) == 1
    assert [str(tmp_path / "metrics.jsonl") in line for line in lines] == [True] * told


def test_the_last_two_checkpoints_are_kept_and_one_in_the_end(tmp_path: Path) -> None:
    folder, parts = StateFolder(tmp_path / "state", MARKS), trained(1)
    for step in (1, 2, 3):
        saved(folder, step, *parts)
    assert [path.name for path in sorted(folder.folder.iterdir())] == ["step-00000002", "step-00000003"]
    folder.keep_only_last()
    assert folder.last() == str(tmp_path / "state" / "step-00000003")
    assert [path.name for path in folder.folder.iterdir()] == ["step-00000003"]


def test_of_a_training_that_decays_the_last_checkpoint_before_it_is_kept(tmp_path: Path) -> None:
    folder, parts = StateFolder(tmp_path / "state", MARKS, trunk=("trunk", 2)), trained(1)
    kept = []
    for step in (1, 2, 3, 4):
        saved(folder, step, *parts)
        kept.append(sorted(int(path.name[5:]) for path in folder.folder.iterdir()))
    assert kept == [[1], [1, 2], [2, 3], [2, 4]]
    folder.keep_only_last()
    assert [path.name for path in folder.folder.iterdir()] == ["step-00000002"]


def test_a_resume_on_another_device_says_that_it_is_no_longer_bit_exact(tmp_path: Path) -> None:
    lines: list[str] = []
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    saved(StateFolder(tmp_path, {"data": "a"}, device="cuda", log=lines.append), 1, model, optimizer)
    assert StateFolder(tmp_path, {"data": "a"}, device="cuda", log=lines.append).load(model, optimizer) == 1
    assert lines == []
    assert StateFolder(tmp_path, {"data": "a"}, device="cpu", log=lines.append).load(model, optimizer) == 1
    assert "resumed on cpu what was trained on cuda" in lines[0]
