"""A step that fails in the middle of a training, by its numbers or for want of memory: told, noted, nothing of it is
kept, and run again the training goes on bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from btx.errors import BtxError, NotFinite, OutOfMemory
from btx.files import file_sha256
from btx.moe.layer import MoE
from btx.process import Interrupts
from btx.run_folder.folder import RunFolder
from btx.run_folder.status import stage_status
from btx.stages.work import run_stages
from btx.training import step as step_module
from tests.pico_run import pico_recipe, run_here

FAILS = 5
"""Number of the step that fails, from 1: two after a checkpoint."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_here(pico_recipe(tmp_path_factory.mktemp("numbers")), ["data"])[0]


@pytest.fixture(scope="module")
def undisturbed(prepared: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> str:
    return final(prepared, tmp_path_factory.mktemp("undisturbed"))[0]


def final(prepared: RunFolder, folder: Path) -> tuple[str, list[str]]:
    """SHA-256 of the seed model, trained to its end in a copy of the run, and what was said."""
    if not (folder / "run").exists():
        shutil.copytree(prepared.path, folder / "run")
    said: list[str] = []
    run = RunFolder(folder / "run", prepared.recipe)
    run_stages(run, ["seed"], Interrupts(), said.append)
    return file_sha256(run.model("seed") / "model.safetensors"), said


def nothing_left(loss: Tensor) -> Tensor:
    return loss + torch.empty(1 << 50).sum()  # more than any machine has: the allocator itself refuses


@pytest.mark.parametrize(("fault", "kind", "told"), [
    (lambda loss: loss * float("nan"), NotFinite, r"^step 5: the loss is nan .* weights were not updated\. Last good "
                                                  r"checkpoint: .*step-00000003\. Lower learning_rate"),
    (lambda loss: loss * float("inf"), NotFinite, r"^step 5: the loss is inf "),
    (nothing_left, OutOfMemory, r"out of memory.* gradient_checkpointing: true saves about "),
], ids=["nan", "infinite", "memory"])  # fmt: skip
def test_a_step_that_fails_is_told_and_costs_the_steps_since_the_checkpoint(
    prepared: RunFolder, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Tensor], Tensor], kind: type[BtxError], told: str,
) -> None:  # fmt: skip
    now, next_token_loss, at_step = [0], step_module.next_token_loss, step_module.at_step

    def note(blocks: Sequence[MoE], number: int) -> None:
        now[0] = number + 1
        at_step(blocks, number)

    def loss(*arguments: Tensor) -> Tensor:
        right = next_token_loss(*arguments)
        return fault(right) if now[0] == FAILS else right

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "at_step", note)
        patch.setattr(step_module, "next_token_loss", loss)
        with pytest.raises(kind, match=told) as caught:
            final(prepared, tmp_path)
    run = RunFolder(tmp_path / "run", prepared.recipe)
    status = stage_status(run, run.graph["seed"])
    assert (status.state, status.step, status.why) == ("failed", FAILS - 1, str(caught.value).splitlines()[-1])
    assert [path.name for path in (run.folder("seed") / "state").iterdir()] == ["step-00000003"]
    weights, said = final(prepared, tmp_path)
    assert "resumed after step 3 of 10" in said
    assert weights == undisturbed
