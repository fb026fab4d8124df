"""Steps that are read when the next one has been launched, as on a GPU: the same training, its faults included."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from btx.errors import NotFinite
from btx.models.from_scratch import new_model
from btx.moe.balancing import Balancing
from btx.moe.layer import MoE, moe_blocks, swap_in_moe, use_selection_bias
from btx.planning.speed import RandomSamples
from btx.process import Interrupts
from btx.recipe.training import Finetune
from btx.training import step as step_module
from btx.training.checkpoints import Checkpoints
from btx.training.job import TrainingJob
from btx.training.loop import run_training
from btx.training.optimizer import kept_tensors
from tests.conftest import PICO_LLAMA
from tests.pico_run import StopAfter

LENGTH, SAMPLES, STEPS = 16, 4, 12


class Kept(Checkpoints):
    """Keeps the state of every checkpoint, and what the optimiser is."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}
        self.optimizer: torch.optim.Optimizer | None = None

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        self.optimizer = optimizer
        return 0

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.states[step] = state(model, optimizer)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, selection biases and moments."""
    weights, moments = kept_tensors(model, optimizer)
    return {name: tensor.detach().clone() for name, tensor in (weights | moments).items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Step, from 0 → what its loss is multiplied by. Steps that have begun are noted with 1."""
    by_step: dict[int, float] = {}
    now, at_step, next_token_loss = [0], step_module.at_step, step_module.next_token_loss

    def note(blocks: Sequence[MoE], step: int) -> None:
        now[0] = step
        by_step.setdefault(step, 1.0)
        at_step(blocks, step)

    def loss(*arguments: Any) -> Tensor:
        return next_token_loss(*arguments) * by_step[now[0]]

    monkeypatch.setattr(step_module, "at_step", note)
    monkeypatch.setattr(step_module, "next_token_loss", loss)
    return by_step


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., tuple[TrainingJob, Kept, list[str], Callable[[], list[dict[str, Any]]]]]:
    """A MoE model that is to train for twelve steps, with selection biases: job, checkpoints, and what will be said."""

    def new(name: str, **settings: Any) -> Any:
        config = {**PICO_LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
        model = new_model(config, rng_seed=0)
        swap_in_moe(model)
        use_selection_bias(model)
        given = Finetune.model_validate({
            "tokens": STEPS * SAMPLES * LENGTH, "batch_tokens": SAMPLES * LENGTH, "micro_batch_tokens": 2 * LENGTH,
            "learning_rate": 1e-2, "warmup_steps": 0, "clip": 2.0, "checkpoint_every": 5, "load_balancing_bias": 0.01,
            **settings,
        })  # fmt: skip
        kept, folder = Kept(), tmp_path / name
        folder.mkdir()
        job = TrainingJob(model=model, mixture=RandomSamples(320, LENGTH), settings=given, folder=folder,
                          checkpoints=kept, flops_per_token=1.0, rng_seed=0, balancing=Balancing.of(given))  # fmt: skip
        return job, kept, [], lambda: lines(folder)

    return new


def lines(folder: Path) -> list[dict[str, Any]]:
    """Those of metrics.jsonl, without times."""
    text = (folder / "metrics.jsonl").read_text("utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items() if key not in ("wall_s", "tokens_per_s")} for line in found]


def test_metrics_checkpoints_and_warnings_are_the_same(start: Any, factors: dict[int, float]) -> None:
    factors[10] = 4.0
    at_once, kept_at_once, said_at_once, lines_at_once = start("at_once")
    later, kept_later, said_later, lines_later = start("later")
    run_training(at_once, Interrupts(), said_at_once.append, read_later=False)
    run_training(later, Interrupts(), said_later.append, read_later=True)
    assert sorted(kept_later.states) == [5, 10, 12]
    assert all(equal(state, kept_at_once.states[step]) for step, state in kept_later.states.items())
    assert lines_later() == lines_at_once()
    assert [line["step"] for line in lines_later()] == list(range(1, STEPS + 1))
    norms = [line["grad_norm"] for line in lines_later()]
    assert min(norms) < later.settings.clip < max(norms), "gradients are clipped in some steps and not in others"
    assert said_later == said_at_once
    assert len([line for line in said_later if line.startswith("warning")]) == 1, "the spike"


def test_the_step_before_a_checkpoint_is_not_told_to_have_taken_no_time(start: Any) -> None:
    """It is read right after the one before: on an H100 with 1,086 % of its peak."""
    job, kept, _, _ = start("later")
    run_training(job, Interrupts(), print, read_later=True)
    text = (job.folder / "metrics.jsonl").read_text("utf-8")
    speeds = [json.loads(line)["tokens_per_s"] for line in text.splitlines()]
    assert max(speeds[step - 1] for step in kept.states) < 5 * median(speeds)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_leaves_everything_as_it_was(
    start: Any, factors: dict[int, float], bad: float
) -> None:
    factors[1] = bad
    at_once, kept_at_once, _, lines_at_once = start("at_once")
    later, kept_later, _, lines_later = start("later")
    with pytest.raises(NotFinite) as said_at_once:
        run_training(at_once, Interrupts(), print, read_later=False)
    before = state(at_once.model, kept_at_once.optimizer)
    assert 2 not in factors, "it stopped in that step"
    with pytest.raises(NotFinite) as said_later:
        run_training(later, Interrupts(), print, read_later=True)
    assert 2 in factors, "another step was launched before it was read"
    assert equal(state(later.model, kept_later.optimizer), before)
    assert any(block.selection_bias.any() for block in moe_blocks(later.model))
    assert str(said_later.value) == str(said_at_once.value)
    assert "step 2: the loss is" in str(said_later.value)
    assert lines_later() == lines_at_once()
    assert not kept_later.states


def test_a_checkpoint_is_kept_only_when_its_step_was_read(start: Any, factors: dict[int, float]) -> None:
    factors[4] = math.nan
    job, kept, _, read = start("run")
    with pytest.raises(NotFinite, match="step 5"):
        run_training(job, Interrupts(), print, read_later=True)
    assert not kept.states
    assert len(read()) == 4
    assert 5 not in factors


def test_a_signal_saves_the_step_that_was_launched_last(start: Any) -> None:
    job, kept, _, read = start("run")
    interrupts = StopAfter(3)
    interrupts.pending = 15
    with pytest.raises(Exception, match="stopped after step 3"):
        run_training(job, interrupts, print, read_later=True)
    assert sorted(kept.states) == [1, 2, 3]
    assert len(read()) == 3
