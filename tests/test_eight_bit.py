"""Moments in 8 bits, and bfloat16 weights without a master: exact across a resume, right on average, refused early."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from btx.errors import UserError
from btx.models import device as device_module
from btx.models.seed_config import seed_config
from btx.planning.speed import training_speed
from btx.recipe.training import Training
from btx.running.preflight import check_packages, preflight
from btx.training import eight_bit
from btx.training.optimizer import adamw, kept_tensors, restore_tensors, set_learning_rate
from btx.training.working_weights import give_back_float32, master_of
from tests.pico_run import pico_recipe

WIDTH, RATE = 64, 1e-3  # 64 x 64 is the smallest matrix whose moments are held in 8 bits


def needs_torchao() -> None:
    pytest.importorskip("torchao.optim", reason='needs torchao: pip install "branchtrainmix[adam8bit]"')


class Regression(nn.Module):
    """A linear model without a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def get_output_embeddings(self) -> None: ...

    def step(self, optimizer: torch.optim.Optimizer, number: int) -> None:
        """One step in two micro-batches."""
        torch.manual_seed(number)
        x_TD = torch.randn(32, WIDTH)
        set_learning_rate(optimizer, RATE)
        for rows in x_TD.split(16):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.linear.weight.dtype == torch.bfloat16):
                (self.linear(rows).float() - rows.roll(1, dims=1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def settings(**more: str) -> Training:
    return Training.model_validate({"tokens": 1, "optimizer": "adamw_8bit", "weight_decay": 0.0, **more})


SCHEMES = {
    "float32": {}, "masters": {"precision": "bfloat16"}, "no masters": {"precision": "bfloat16", "weights": "bfloat16"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _a_processor_with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "has_bfloat16_units", lambda: True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, scheme: str) -> None:
    needs_torchao()
    whole, resumed = Regression(), Regression()
    optimizer = adamw(whole, settings(**SCHEMES[scheme]))
    for number in range(3):
        whole.step(optimizer, number)
    for file, tensors in zip(("weights", "moments"), kept_tensors(whole, optimizer), strict=True):
        save_file({name: tensor.detach() for name, tensor in tensors.items()}, tmp_path / file)
    its_optimizer = adamw(resumed, settings(**SCHEMES[scheme]))
    saved = load_file(tmp_path / "moments")
    restore_tensors(resumed, its_optimizer, load_file(tmp_path / "weights"), saved)
    for number in range(3, 6):
        whole.step(optimizer, number)
        resumed.step(its_optimizer, number)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    weight = whole.linear.weight
    assert saved["exp_avg.codes/linear.weight"].dtype == torch.uint8
    assert saved["exp_avg.scale/linear.weight"].numel() == weight.numel() / 256
    assert saved["exp_avg/linear.bias"].dtype == torch.float32
    assert (master_of(weight) is weight) == (scheme != "masters")
    give_back_float32(whole)
    assert whole.linear.weight.dtype == torch.float32


def test_the_moments_are_adamws_within_the_steps_of_their_codes() -> None:
    needs_torchao()
    model, reference = Regression(), Regression()
    optimizer, exact = adamw(model, settings()), adamw(reference, settings(optimizer="adamw"))
    for number in range(5):
        model.step(optimizer, number)
        reference.step(exact, number)
    moved, expected = (each.linear.weight - Regression().linear.weight for each in (model, reference))
    assert (moved - expected).norm() < 0.05 * expected.norm()
    moment: Tensor = optimizer.state[model.linear.weight]["exp_avg"].dequantize()
    wanted = exact.state[reference.linear.weight]["exp_avg"]
    assert (moment - wanted).norm() < 0.05 * wanted.norm()


def test_weights_without_a_master_move_on_average_by_steps_that_bfloat16_cannot_show() -> None:
    needs_torchao()
    model = Regression()
    with torch.no_grad():
        model.linear.weight.fill_(1.0)
    given = settings(precision="bfloat16", weights="bfloat16", beta1="0", beta2="0")
    optimizer = adamw(model, given)
    for number in range(20):  # |update| is the learning rate, a sixteenth of the space between bfloat16's 1 and 0.996
        torch.manual_seed(number)
        set_learning_rate(optimizer, 2.0**-12)
        model.linear.weight.grad = torch.ones(WIDTH, WIDTH)
        optimizer.step()
    moved = 1.0 - model.linear.weight.float().mean().item()
    assert moved == pytest.approx(20 * 2.0**-12, rel=0.05)
    assert model.linear.weight.unique().numel() > 1


def test_adamw_8bit_without_torchao_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pico_recipe(tmp_path, "run", "finetune.optimizer=adamw_8bit")
    monkeypatch.setattr(eight_bit, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'finetune\.optimizer: adamw_8bit .* pip install "branchtrainmix\[adam8bit\]"'):
        check_packages(recipe)
    assert not Path(recipe.run_folder).exists()
    with pytest.raises(UserError, match="torchao"):
        adamw(nn.Linear(2, 2), settings())


def test_a_plan_for_another_machine_needs_no_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = ["train.optimizer=adamw_8bit", "train.precision=bfloat16", "train.weights=bfloat16"]
    recipe = pico_recipe(tmp_path, "run", *scheme)
    monkeypatch.setattr(eight_bit, "find_spec", lambda name: None)
    preflight(recipe)
    assert training_speed(recipe, seed_config(recipe), torch.device("cpu"), threads=1) is not None
