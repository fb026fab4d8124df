"""One optimiser step against AdamW written out (Loshchilov and Hutter, arXiv 1711.05101), and its gradient clipping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btx.models.loading import load_model
from btx.planning.speed import RandomSamples
from btx.recipe.training import Training
from btx.training.checkpoints import Checkpoints
from btx.training.job import TrainingJob
from btx.training.optimizer import adamw
from btx.training.step import training_step

SAMPLES, LENGTH = 4, 16
RATE, BETA1, BETA2, DECAY = 1e-2, 0.9, 0.95, 0.1


@pytest.fixture
def model(make_llama: Callable[..., Path]) -> nn.Module:
    return load_model(make_llama("seed"))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the mean next-token loss over the step's samples, the plain way."""
    batch = RandomSamples(320, LENGTH).batch(0, SAMPLES)
    logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits
    F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def norm_of(values: dict[str, Tensor]) -> float:
    return torch.stack([value.double().square().sum() for value in values.values()]).sum().sqrt().item()


def step(model: nn.Module, **settings: float) -> tuple[torch.optim.Optimizer, dict[str, float]]:
    """The first step of a training, in two micro-batches."""
    given = Training.model_validate({
        "tokens": 1, "batch_tokens": SAMPLES * LENGTH, "micro_batch_tokens": 2 * LENGTH, "learning_rate": RATE,
        "beta1": BETA1, "beta2": BETA2, "weight_decay": DECAY, "clip": 1e9, **settings,
    })  # fmt: skip
    job = TrainingJob(model=model, mixture=RandomSamples(320, LENGTH), settings=given, folder=Path(),
                      checkpoints=Checkpoints(), flops_per_token=1.0, rng_seed=0)  # fmt: skip
    optimizer = adamw(model, given)
    return optimizer, training_step(job, optimizer, 0, SAMPLES)


def test_the_first_moments_are_those_of_the_mean_gradient_with_each_its_own_beta(model: nn.Module) -> None:
    expected = gradients(model)
    optimizer, facts = step(model)
    assert all(group["betas"] == (BETA1, BETA2) for group in optimizer.param_groups)
    assert facts["grad_norm"] == pytest.approx(norm_of(expected), rel=1e-4)
    for name, parameter in model.named_parameters():
        state, gradient = optimizer.state[parameter], expected[name]
        torch.testing.assert_close(state["exp_avg"], (1 - BETA1) * gradient, rtol=1e-3, atol=1e-7, msg=name)
        torch.testing.assert_close(state["exp_avg_sq"], (1 - BETA2) * gradient.square(), rtol=2e-3, atol=1e-9, msg=name)


def test_matrices_decay_and_norms_do_not(model: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, _ = step(model)
    norms = {name for name in before if "norm" in name}
    assert len(norms) == 5  # two a layer and the last
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        mean, square = state["exp_avg"] / (1 - BETA1), state["exp_avg_sq"] / (1 - BETA2)
        kept = 1.0 if name in norms else 1 - RATE * DECAY
        expected = kept * before[name] - RATE * mean / (square.sqrt() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_a_huge_gradient_moves_as_one_of_the_largest_norm_allowed(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(100)  # the loss is steep
    expected = gradients(model)
    largest = norm_of(expected) / 1000
    optimizer, facts = step(model, clip=largest)
    assert facts["grad_norm"] == pytest.approx(1000 * largest, rel=1e-4), "the norm told is the one before clipping"
    taken = {name: optimizer.state[p]["exp_avg"] / (1 - BETA1) for name, p in model.named_parameters()}
    assert norm_of(taken) == pytest.approx(largest, rel=1e-3)
    for name, gradient in taken.items():
        torch.testing.assert_close(1000 * gradient, expected[name], rtol=1e-3, atol=1e-4 * largest * 1000, msg=name)


def test_a_gradient_below_the_largest_norm_is_left_as_it_is(model: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, facts = step(model)
    free = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(before, strict=False)
    step(model, clip=1.01 * facts["grad_norm"])
    assert all(torch.equal(p, free[name]) for name, p in model.named_parameters())
    assert not all(torch.equal(before[name], free[name]) for name in free)
