"""The learning rate's shape, and that the optimiser gets it (paper, section 4.1: warm-up, cosine to 10 %)."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from btx.models.loading import load_model
from btx.planning.speed import RandomSamples
from btx.process import Interrupts
from btx.recipe.training import Training
from btx.training.checkpoints import Checkpoints
from btx.training.job import TrainingJob
from btx.training.loop import run_training
from btx.training.schedule import learning_rate


def rates(steps: int, **settings: float | str) -> list[float]:
    given = Training.model_validate({"tokens": 1, "learning_rate": 2.0, "warmup_steps": 0, **settings})
    return [learning_rate(step, steps, given) for step in range(steps)]


def test_the_rate_follows_a_cosine_from_the_peak_to_a_share_of_it() -> None:
    # cos(π/4) = 0.7071: a straight line would be at 0.775 and 0.325 after one and three quarters of the way.
    eighths = [rate / 2.0 for rate in rates(8)]
    assert eighths[1::2] == pytest.approx([0.868198, 0.55, 0.231802, 0.1], abs=1e-6)
    assert all(before > after for before, after in pairwise(eighths))


def test_warm_up_is_a_straight_line_to_the_peak_and_the_cosine_begins_after_it() -> None:
    warm = rates(12, warmup_steps=4)
    assert warm[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert warm[4:] == pytest.approx(rates(8))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_last_step_has_the_final_share(share: float) -> None:
    assert rates(7, warmup_steps=2, final_learning_rate_share=share)[-1] == pytest.approx(2.0 * share)


def test_a_training_shorter_than_its_warm_up_ends_at_the_peak() -> None:
    assert rates(4, warmup_steps=100) == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_a_constant_rate_stays_at_the_peak_so_that_a_longer_training_begins_with_a_shorter_one() -> None:
    shorter, longer = (rates(steps, warmup_steps=3, schedule="constant") for steps in (8, 20))
    assert shorter == longer[:8]
    assert shorter[3:] == [2.0] * 5


@pytest.mark.parametrize(("shape", "left"), [
    ("linear", [0.75, 0.5, 0.25, 0.0]), ("cosine", [0.853553, 0.5, 0.146447, 0.0]),
    ("sqrt", [0.5, 0.292893, 0.133975, 0.0]),
])  # fmt: skip
def test_wsd_stays_at_the_peak_and_falls_in_its_last_share(shape: str, left: list[float]) -> None:
    settings = {"schedule": "wsd", "decay_share": 0.2, "decay_shape": shape, "final_learning_rate_share": 0.0}
    wsd = [rate / 2.0 for rate in rates(20, warmup_steps=4, **settings)]
    assert wsd[:16] == [*[0.25, 0.5, 0.75], *[1.0] * 13]
    assert wsd[16:] == pytest.approx(left, abs=1e-6)
    assert rates(20, warmup_steps=4, **settings | {"final_learning_rate_share": 0.1})[-1] == pytest.approx(0.2)


def test_wsd_that_falls_from_the_first_step_is_the_shape_alone() -> None:
    everything = rates(8, schedule="wsd", decay_share=1.0, decay_shape="cosine")
    assert everything == pytest.approx(rates(8))
    assert rates(6, warmup_steps=4, schedule="wsd", decay_share=1.0)[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_a_decay_without_wsd_is_refused() -> None:
    with pytest.raises(ValidationError, match="decay_share goes with schedule: wsd; here it is cosine"):
        rates(4, decay_share=0.5)


class Watching(Checkpoints):
    """Notes the optimiser's learning rate after every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.rates += {group["lr"] for group in optimizer.param_groups}


def test_every_step_is_made_with_the_rate_of_the_schedule(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    settings = Training(tokens=6 * 16, batch_tokens=16, micro_batch_tokens=16, learning_rate=1e-3, warmup_steps=2,
                        checkpoint_every=1)  # fmt: skip
    watching, samples = Watching(), RandomSamples(320, sequence_length=16)
    job = TrainingJob(model=load_model(make_llama("seed")), mixture=samples, settings=settings, folder=tmp_path,
                      checkpoints=watching, flops_per_token=1.0, rng_seed=0)  # fmt: skip
    run_training(job, Interrupts(), print)
    expected = [learning_rate(step, 6, settings) for step in range(6)]
    assert watching.rates == expected
    lines = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["learning_rate"] for line in lines] == expected
