"""Loss spikes: what counts as one, and what is done about it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from btx.errors import LossSpike, NotFinite
from btx.moe.layer import MoE
from btx.process import Interrupts
from btx.recipe.training import Train
from btx.run_folder.decisive import decisive
from btx.run_folder.folder import RunFolder
from btx.run_folder.status import stage_status
from btx.stages.work import run_stages
from btx.training import step as step_module
from btx.training.job import TrainingJob
from btx.training.metrics import Metrics
from btx.training.spikes import SpikeWatch
from tests.pico_run import pico_recipe, run_here, stopped_after

STEPS, SPIKES = 15, (11, 13)
"""Steps of the seed's training, from 0, and those whose loss is made four times as large."""


def lines(losses: list[float], norms: list[float] | None = None) -> list[dict[str, float]]:
    return [{"loss": x, "grad_norm": y} for x, y in zip(losses, norms or [1.0] * len(losses), strict=True)]


@pytest.mark.parametrize(("before", "step", "spike"), [
    (lines([2.0] * 8), {"loss": 2.5, "grad_norm": 1.0}, {"of": "loss", "usual": 2.0, "factor": 1.25}),
    (lines([2.0] * 8), {"loss": 2.39, "grad_norm": 1.0}, None),  # not 1.2 times the median
    (lines([2.0] * 7), {"loss": 9.0, "grad_norm": 9.0}, None),  # too few steps to know what is usual
    (lines([2.0, 3.0] * 20), {"loss": 4.0, "grad_norm": 1.0}, None),  # 2.5 and 3 deviations of 0.5
    (lines([2.0, 3.0] * 20), {"loss": 5.6, "grad_norm": 1.0}, {"of": "loss", "usual": 2.5, "factor": 2.24}),
    (lines([2.0] * 8), {"loss": 2.0, "grad_norm": 5.1}, {"of": "grad_norm", "usual": 1.0, "factor": 5.1}),
    (lines([2.0] * 8), {"loss": 2.0, "grad_norm": 5.0}, None),
    (lines([1.0] * 50 + [2.0] * 100), {"loss": 2.1, "grad_norm": 1.0}, None),  # only the last 100 count
    (lines([6.0, 5.0, 4.0, 3.5, 3.2, 3.0, 2.9, 2.8]), {"loss": 2.9, "grad_norm": 1.0}, None),
])  # fmt: skip
def test_a_spike_stands_far_out_from_the_last_steps(
    before: list[dict[str, float]], step: dict[str, float], spike: dict[str, Any] | None
) -> None:
    found = SpikeWatch(before).see(step)
    assert {key: (found or {}).get(key) for key in ("of", "usual", "factor")} == (spike or dict.fromkeys(
        ("of", "usual", "factor")))  # fmt: skip


def test_a_spike_does_not_hide_the_next_and_a_loss_that_stays_high_is_in_time_the_usual_one() -> None:
    watch = SpikeWatch(lines([1.0, 1.1] * 10))
    high, low = {"loss": 3.0, "grad_norm": 1.0}, {"loss": 1.05, "grad_norm": 1.0}
    assert [watch.see(step) is not None for step in (high, low, high, low, high)] == [True, False, True, False, True]
    spikes = [watch.see(high) is not None for _ in range(100)]
    assert spikes[0]
    assert not any(spikes[50:])


def test_a_resumed_training_knows_as_many_steps_with_a_loss_as_one_that_went_through(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    steps = [{"step": step, "loss": 2.0, "grad_norm": 1.0} for step in range(1, 151)]
    for step in (60, 149):
        steps[step - 1] = {"step": step, "spike": {"of": "loss", "value": "nan", "skipped": True}}
    path.write_text("".join(json.dumps(line) + "\n" for line in steps))
    recent = Metrics(path, 150).recent
    assert (recent[0]["step"], sum("loss" in line for line in recent)) == (49, 100)
    assert SpikeWatch(recent).see({"loss": 2.5, "grad_norm": 1.0}) is not None


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Step of every training, from 0 → what its loss is multiplied by."""
    now, next_token_loss, at_step = [0], step_module.next_token_loss, step_module.at_step
    factors: dict[int, float] = {}

    def note(blocks: Sequence[MoE], step: int) -> None:
        now[0] = step
        at_step(blocks, step)

    def loss(*arguments: Any) -> torch.Tensor:
        return next_token_loss(*arguments) * factors.get(now[0], 1.0)

    monkeypatch.setattr(step_module, "at_step", note)
    monkeypatch.setattr(step_module, "next_token_loss", loss)
    return factors


@pytest.fixture
def spiky(factors: dict[int, float]) -> None:
    """The loss of two steps of every training is four times what it should be."""
    factors |= dict.fromkeys(SPIKES, 4.0)


def seed_run(folder: Path, name: str, on_spike: str, steps: int = STEPS) -> RunFolder:
    """A run that has its data, and whose seed model trains for so many steps."""
    overrides = [f"seed_model.train.tokens={256 * steps}", f"seed_model.train.on_spike={on_spike}"]
    return run_here(pico_recipe(folder, name, *overrides), ["data"])[0]


def metrics(run: RunFolder) -> list[dict[str, Any]]:
    text = (run.folder("seed") / "metrics.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def train(run: RunFolder) -> list[str]:
    said: list[str] = []
    run_stages(run, ["seed"], Interrupts(), said.append)
    return said


def test_a_spike_is_told_and_noted_and_the_step_is_taken(tmp_path: Path, spiky: None) -> None:
    run = seed_run(tmp_path, "run", "log")
    said = train(run)
    told = [line for line in said if "times the usual" in line]
    assert [line.partition(": the loss is ")[0] for line in told] == ["warning: step 12", "warning: step 14"]
    noted = {line["step"] - 1: line["spike"] for line in metrics(run) if "spike" in line}
    assert sorted(noted) == list(SPIKES)
    for step, spike in noted.items():
        assert spike["of"] == "loss"
        assert not spike["skipped"]
        assert spike["factor"] == pytest.approx(metrics(run)[step]["loss"] / spike["usual"], abs=1e-3)


def test_a_step_left_out_leaves_weights_and_moments_as_they_were(make_llama: Callable[..., Path]) -> None:
    from btx.models.loading import load_model
    from btx.planning.speed import RandomSamples
    from btx.recipe.training import Training
    from btx.training.checkpoints import Checkpoints
    from btx.training.optimizer import adamw

    model = load_model(make_llama("seed"))
    settings = Training(tokens=1, batch_tokens=64, micro_batch_tokens=64, learning_rate=1e-2, on_spike="skip")
    job = TrainingJob(model=model, mixture=RandomSamples(320, 16), settings=settings, folder=Path(),
                           checkpoints=Checkpoints(), flops_per_token=1.0, rng_seed=0)  # fmt: skip
    optimizer = adamw(model, settings)
    step_module.training_step(job, optimizer, 0, 4, SpikeWatch())

    def everything() -> dict[str, torch.Tensor]:
        moments = {f"{name}/{key}": value for name, p in model.named_parameters()
                   for key, value in optimizer.state[p].items()}  # fmt: skip
        return {name: value.detach().clone() for name, value in (dict(model.named_parameters()) | moments).items()}

    before = everything()
    facts = step_module.training_step(job, optimizer, 1, 4, SpikeWatch(lines([0.1] * 8)))
    assert facts["spike"]["skipped"]
    after = everything()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.parameters()), "its gradient is not in the next step's"
    step_module.training_step(job, optimizer, 2, 4, SpikeWatch())
    assert not all(torch.equal(before[name], value) for name, value in everything().items())


def test_a_resumed_training_leaves_out_the_same_steps(tmp_path: Path, spiky: None) -> None:
    whole, cut = seed_run(tmp_path, "whole", "skip"), seed_run(tmp_path, "cut", "skip")
    train(whole)
    stopped_after(cut, "seed", 13)  # the last checkpoint is that of step 12, which was left out
    assert any("resumed after step 12" in line for line in train(cut))
    assert [line["spike"]["skipped"] for line in metrics(cut) if "spike" in line] == [True, True]
    assert [line["loss"] for line in metrics(cut)] == [line["loss"] for line in metrics(whole)]
    one, two = (load_file(run.model("seed") / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_steps_without_numbers_are_left_out_alike_after_a_resume_and_too_many_in_a_row_stop_it(
    tmp_path: Path, factors: dict[int, float]
) -> None:
    factors |= {1: math.nan, 11: math.inf, 12: math.nan}
    whole, cut = seed_run(tmp_path, "whole", "skip"), seed_run(tmp_path, "cut", "skip")
    said = train(whole)
    assert [line for line in said if "left out" in line] == [
        f"warning: step {step}: the loss is {value}; this step is left out, as on_spike: skip says"
        for step, value in ((2, "nan"), (12, "inf"), (13, "nan"))
    ]
    lines_of_whole = metrics(whole)
    assert [line["step"] for line in lines_of_whole if "loss" not in line] == [2, 12, 13]
    assert lines_of_whole[11]["spike"] == {"of": "loss", "value": "inf", "skipped": True}
    stopped_after(cut, "seed", 13)
    status = stage_status(cut, cut.graph["seed"])
    assert (status.step, status.loss) == (13, None)
    train(cut)
    assert [line.get("loss") for line in metrics(cut)] == [line.get("loss") for line in lines_of_whole]
    one, two = (load_file(run.model("seed") / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)

    factors |= dict.fromkeys(range(3, 14), math.nan)  # steps 4 to 14: eleven
    with pytest.raises(NotFinite, match=r"^step 14: the loss is nan"):
        train(seed_run(tmp_path, "broken", "skip"))


def test_a_training_whose_every_step_is_left_out_has_failed(tmp_path: Path, factors: dict[int, float]) -> None:
    factors |= dict.fromkeys(range(8), math.nan)  # fewer than are too many in a row
    run = seed_run(tmp_path, "run", "skip", steps=8)
    with pytest.raises(NotFinite, match=r"^each of the 8 steps was left out.*nothing was trained") as failed:
        train(run)
    assert failed.value.exit_code == 1
    assert run.done("seed") is None


def test_a_training_that_stops_has_saved_what_was_before_and_goes_on_with_log(tmp_path: Path, spiky: None) -> None:
    plain, run = seed_run(tmp_path, "plain", "log"), seed_run(tmp_path, "run", "stop")
    train(plain)
    for _ in range(2):  # it stops there again
        with pytest.raises(LossSpike, match=r"step 12: the loss is .* times the usual .*on_spike: log") as stopped:
            train(run)
        assert stopped.value.exit_code == 1
        assert sorted(path.name for path in (run.folder("seed") / "state").iterdir())[-1] == "step-00000011"
        assert len(metrics(run)) == 11
    going_on = seed_run(tmp_path, "run", "log")
    assert any("resumed after step 11" in line for line in train(going_on))
    one, two = (load_file(run.model("seed") / "model.safetensors") for run in (plain, going_on))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_stopping_is_no_other_result_and_leaving_out_is_one() -> None:
    plain, stop, skip = (decisive(Train(domains=["a"], tokens=1, on_spike=on)) for on in ("log", "stop", "skip"))
    assert stop == plain
    assert skip == plain | {"on_spike": "skip"}
