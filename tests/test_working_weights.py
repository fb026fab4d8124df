"""bfloat16 copies of float32 masters: the same numbers as under autocast alone, and what is saved has lost nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from btx.models import device as device_module
from btx.models.device import precision_text
from btx.models.loading import load_model, load_tokenizer, save_model
from btx.models.trainable import set_trainable
from btx.moe.balancing import Balancing
from btx.moe.layer import use_selection_bias
from btx.planning.plan import plan
from btx.planning.speed import RandomSamples
from btx.process import Interrupts
from btx.recipe.training import Finetune, Training
from btx.training import optimizer as optimizer_module
from btx.training.checkpoints import Checkpoints
from btx.training.job import TrainingJob
from btx.training.loop import run_training
from btx.training.optimizer import adamw, kept_tensors, restore_tensors, set_learning_rate
from btx.training.step import training_step
from btx.training.working_weights import give_back_float32, give_back_frozen, master_of
from tests.pico_models import llama, mixtral
from tests.pico_run import pico_recipe, run_here

SAMPLES, LENGTH, STEPS = 4, 16, 3


@pytest.fixture(autouse=True)
def _a_processor_with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic is exact to the same bits without them, only slower."""
    monkeypatch.setattr(device_module, "has_bfloat16_units", lambda: True)


def settings(**more: object) -> Finetune:
    given = {"tokens": STEPS * SAMPLES * LENGTH, "batch_tokens": SAMPLES * LENGTH, "micro_batch_tokens": 2 * LENGTH,
             "learning_rate": 1e-3, "warmup_steps": 0,
             "final_learning_rate_share": 1.0, "precision": "bfloat16"}  # fmt: skip
    return Finetune.model_validate(given | more)


def job_of(model: nn.Module, given: Training, folder: Path = Path()) -> TrainingJob:
    return TrainingJob(
        model=model, mixture=RandomSamples(320, LENGTH), settings=given, folder=folder, checkpoints=Checkpoints(),
        flops_per_token=1.0, rng_seed=0, balancing=Balancing.of(given) if isinstance(given, Finetune) else Balancing(),
    )  # fmt: skip


def stepped(model: nn.Module, given: Training, optimizer: torch.optim.Optimizer, first: int = 0) -> list[float]:
    """Losses of the steps."""
    job, losses = job_of(model.train(), given), []
    for step in range(first, first + STEPS):
        set_learning_rate(optimizer, given.learning_rate)
        losses.append(training_step(job, optimizer, step, SAMPLES)["loss"])
    return losses


def autocast_alone(model: nn.Module, given: Training, monkeypatch: pytest.MonkeyPatch) -> torch.optim.Optimizer:
    """The reference: float32 weights that autocast casts in every micro-batch."""
    with monkeypatch.context() as patched:
        patched.setattr(optimizer_module, "in_bfloat16", lambda precision, device: False)
        return adamw(model, given)


def dense(folder: Path) -> nn.Module:
    return load_model(llama(folder))


def feed_forward(folder: Path) -> nn.Module:
    model = load_model(llama(folder))
    set_trainable(model, "feed_forward")
    return model


def tied(folder: Path) -> nn.Module:
    return load_model(llama(folder, tie_word_embeddings=True))


def moe(folder: Path) -> nn.Module:
    model = load_model(mixtral(folder))
    use_selection_bias(model)
    return model


KINDS = {"dense": dense, "feed_forward": feed_forward, "tied": tied, "moe": moe}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_weights_and_checkpoints_are_those_of_autocast_alone_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    given = settings(learning_rate_factors={"routers": 3.0, "experts": 0.5}, load_balancing_bias=0.01)
    reference, model = (KINDS[kind](tmp_path / name) for name in ("reference", "model"))
    its_optimizer, optimizer = autocast_alone(reference, given, monkeypatch), adamw(model, given)
    assert stepped(reference, given, its_optimizer) == stepped(model, given, optimizer)
    kept, expected = kept_tensors(model, optimizer), kept_tensors(reference, its_optimizer)
    for found, wanted in zip(kept, expected, strict=True):
        assert found.keys() == wanted.keys()
        assert all(tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name])
                   for name, tensor in found.items())  # fmt: skip
    copies = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert copies
    assert not any(word in name for name in copies for word in ("norm", "embed", "lm_head", "gate.weight"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, master_of(parameter).to(parameter.dtype)), name
    give_back_float32(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reference.get_parameter(name)), name


def test_a_checkpoint_of_float32_weights_goes_on_in_copies_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, reference, model = settings(), dense(tmp_path / "a"), dense(tmp_path / "b")
    its_optimizer, optimizer = autocast_alone(reference, given, monkeypatch), adamw(model, given)
    stepped(reference, given, its_optimizer)
    weights, moments = ({name: tensor.clone() for name, tensor in kept.items()}
                        for kept in kept_tensors(reference, its_optimizer))  # fmt: skip
    restore_tensors(model, optimizer, weights, moments)
    assert stepped(reference, given, its_optimizer, STEPS) == stepped(model, given, optimizer, STEPS)


def test_a_bfloat16_model_moves_by_less_than_bfloat16_shows(tmp_path: Path) -> None:
    model = dense(tmp_path / "seed")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    given = settings(learning_rate=1e-7, weight_decay=0.0)
    stepped(model, given, adamw(model, given))
    name = "model.layers.0.mlp.up_proj.weight"
    copy = model.get_parameter(name)
    moved = master_of(copy) - start[name]
    assert copy.dtype == torch.bfloat16
    assert torch.equal(copy.float(), start[name]), "a step of 1e-7 is below bfloat16's resolution"
    assert (moved != 0).float().mean() > 0.9
    assert moved.abs().max() <= 1e-7 * STEPS * 1.5


def test_float32_has_neither_copies_nor_masters(tmp_path: Path) -> None:
    model = dense(tmp_path / "seed")
    adamw(model, settings(precision="float32"))
    assert all(master_of(p) is p and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [True, False])
def test_frozen_weights_train_the_same_and_are_saved_as_they_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_tied: bool
) -> None:
    start = llama(tmp_path / "start", tie_word_embeddings=is_tied)
    model = load_model(start, dtype=dtype)
    model.save_pretrained(start)
    given = settings()
    reference, model = (load_model(start) for _ in range(2))
    for each in (reference, model):
        set_trainable(each, "feed_forward")
    expected = stepped(reference, given, autocast_alone(reference, given, monkeypatch))
    lines: list[str] = []
    totals = run_training(job_of(model, given, tmp_path), Interrupts(), lines.append)
    assert "precision: bfloat16, master weights float32" in lines
    held = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert "model.layers.0.self_attn.q_proj.weight" in held
    assert ("model.embed_tokens.weight" in held) == (dtype == torch.bfloat16), "only what bfloat16 holds exactly"
    assert totals.loss == expected[-1]
    give_back_frozen(model, start)
    for folder, each in (("model", model), ("reference", reference)):
        (tmp_path / folder).mkdir()
        save_model(each, tmp_path / folder, like=start, tokenizer=load_tokenizer(start))
    saved, wanted = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "reference"))
    assert saved.keys() == wanted.keys()
    assert all(saved[name].dtype == dtype and torch.equal(saved[name], wanted[name]) for name in saved)


def test_a_branch_of_a_run_leaves_frozen_weights_as_the_seeds_and_says_its_arithmetic(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "run", "train.precision=bfloat16", "train.trainable=feed_forward")
    run, lines = run_here(recipe, ["data", "seed", "train/birds"])
    assert any("precision: float32 (auto: results do not depend on the kind of CPU)" in line for line in lines)  # seed
    assert any("precision: bfloat16, master weights float32" in line for line in lines)
    seed, branch = (load_file(run.model(stage) / "model.safetensors") for stage in ("seed", "train/birds"))
    assert {tensor.dtype for tensor in branch.values()} == {torch.float32}
    moved = {name for name, tensor in branch.items() if not torch.equal(tensor, seed[name])}
    assert moved == {name for name in seed if ".mlp." in name}
    notes = plan(recipe)["notes"]
    assert any(note.startswith("precision of train on this CPU: bfloat16") for note in notes)
    assert any(note.startswith("precision of seed, finetune on this CPU: float32 (auto") for note in notes)


def test_weights_without_masters_are_not_said_to_have_some() -> None:
    given = settings(weights="bfloat16", optimizer="adamw_8bit")
    assert precision_text(given, torch.device("cpu")) == "bfloat16, matrices without float32 masters"
