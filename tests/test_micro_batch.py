"""`micro_batch_tokens: auto`: the largest that fits is taken, nothing else changes, and a resume takes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from btx.errors import OutOfMemory
from btx.models.cost import model_cost
from btx.moe.balancing import Balancing
from btx.moe.layer import use_selection_bias
from btx.recipe.training import Finetune
from btx.run_folder.folder import RunFolder
from btx.training import micro_batch
from btx.training.checkpoints import Checkpoints
from btx.training.job import TrainingJob
from btx.training.memory import MemoryNeeds, halves
from btx.training.micro_batch import AutoMicroBatch, first_that_fits, try_step
from btx.training.optimizer import adamw
from tests.pico_run import pico_recipe, run_here, stopped_after
from tests.test_memory import LENGTH, LLAMA, MIXTRAL, Documents, a_model

FEW = ["seed_model.train.tokens=512", "train.tokens=1280"]


def test_micro_batches_to_try_are_powers_of_two_of_sequences_within_a_step() -> None:
    assert halves(12 * 64, 64) == [512, 256, 128, 64]
    assert halves(64, 64) == halves(10, 64) == [64]


def test_each_size_that_runs_out_of_memory_is_halved_and_the_first_that_fits_is_taken() -> None:
    tried = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > 256:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    assert first_that_fits([1024, 512, 256, 128], attempt) == 256
    assert tried == [1024, 512, 256]
    with pytest.raises(torch.OutOfMemoryError):
        first_that_fits([1024, 512], attempt)


def test_another_error_than_memory_ends_the_trial_at_once() -> None:
    def attempt(size: int) -> None:
        raise RuntimeError(f"shapes do not fit at {size}")

    with pytest.raises(RuntimeError, match="at 1024"):
        first_that_fits([1024, 512], attempt)


def a_job(folder: Path, config: dict[str, Any] = MIXTRAL, device: str = "cpu", **settings: Any) -> TrainingJob:
    given = Finetune(tokens=1, **({"batch_tokens": 8 * LENGTH, "micro_batch_tokens": "auto"} | settings))
    model = a_model(config, given, "all")
    return TrainingJob(
        model=model, mixture=Documents(config["vocab_size"], LENGTH), settings=given, folder=folder, rng_seed=0,
        checkpoints=Checkpoints(), flops_per_token=1.0, balancing=Balancing.of(given), device=torch.device(device),
    )  # fmt: skip


def needs_of(job: TrainingJob) -> MemoryNeeds:
    model: Any = job.model
    return MemoryNeeds(job.settings, model_cost(model).shape, LENGTH, job.device.type)


def settled(job: TrainingJob, needs: MemoryNeeds, log: Callable[[str], None] = print) -> int:
    """What is found for `auto`."""
    job.model.to(job.device)
    found = AutoMicroBatch(needs, "x").settled(job, adamw(job.model, job.settings), log).settings.micro_batch_tokens
    assert found != "auto"
    return found


def test_a_trial_leaves_weights_gradients_biases_and_random_state_as_they_were(tmp_path: Path) -> None:
    job = a_job(tmp_path, load_balancing_bias=0.1)
    use_selection_bias(job.model)
    before = {name: tensor.clone() for name, tensor in [*job.model.named_parameters(), *job.model.named_buffers()]}
    state = torch.get_rng_state()
    try_step(job, adamw(job.model, job.settings), 2 * LENGTH)
    after = dict([*job.model.named_parameters(), *job.model.named_buffers()])
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(p.grad is None for p in job.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_on_a_cpu_the_largest_is_taken_whose_count_fits_into_the_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(tmp_path, LLAMA)
    needs, weights = needs_of(job), 4 * sum(p.numel() for p in job.model.parameters())
    for rows, folder in ((8, "a"), (4, "b"), (1, "c")):
        (tmp_path / folder).mkdir()
        peak = needs.with_changes({"micro_batch_tokens": rows * LENGTH}).memory.peak
        monkeypatch.setattr(micro_batch, "free_memory", lambda peak=peak: int((peak - weights) / 0.8) + 10)
        lines: list[str] = []
        assert settled(a_job(tmp_path / folder, LLAMA), needs, lines.append) == rows * LENGTH
        assert f"auto is {rows * LENGTH:,}" in lines[0]
    monkeypatch.setattr(micro_batch, "free_memory", lambda: 10)
    (tmp_path / "d").mkdir()
    assert settled(a_job(tmp_path / "d", LLAMA), needs, lines.append) == LENGTH
    assert any("warning" in line for line in lines)


# In a run


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    recipe = pico_recipe(tmp_path_factory.mktemp("auto"), "run", *FEW, "train.micro_batch_tokens=auto")
    return run_here(recipe, ["data", "seed"])[0]


def test_a_stage_notes_what_it_took_and_goes_on_with_it_on_a_machine_with_less_memory(
    seeded: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(seeded, "train/birds", 3)
    folder = seeded.folder("train/birds")
    assert json.loads((folder / "micro_batch.json").read_text())["micro_batch_tokens"] == 256  # a step
    monkeypatch.setattr(micro_batch, "free_memory", lambda: 10)
    _, lines = run_here(seeded.recipe, ["train/birds"])
    assert any("auto is 256, as when this training began" in line for line in lines)
    done = seeded.done("train/birds")
    assert done is not None
    assert done["micro_batch_tokens"] == 256

    found = load_file(seeded.model("train/birds") / "model.safetensors")

    fixed = pico_recipe(seeded.path.parent, "run", *FEW, "train.micro_batch_tokens=256")
    wanted = load_file(run_here(fixed, ["train/birds"])[0].model("train/birds") / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()), "bit for bit as if it were written"
    RunFolder.create(seeded.recipe)


def test_out_of_memory_with_one_sequence_names_other_settings(
    seeded: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(micro_batch, "free_memory", lambda: 10)
    monkeypatch.setattr("btx.training.step.next_token_loss", no_memory)
    with pytest.raises(OutOfMemory, match=r"gradient_checkpointing: true saves about .*one sequence already"):
        run_here(seeded.recipe, ["train/tools"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["dense", "moe"])
def test_on_a_gpu_the_largest_that_fits_into_what_is_left_is_found_and_can_be_trained(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    wide = config | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 8192}
    job = a_job(tmp_path, wide, "cuda", batch_tokens=4096 * LENGTH, compile=False)  # as a trial
    needs = needs_of(job)
    limit = needs.with_changes({"micro_batch_tokens": 256 * LENGTH}).memory.peak
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((1.3 * limit + 0.03 * total) / total)
    try:
        tokens = settled(job, needs)
        assert 64 * LENGTH <= tokens <= 1024 * LENGTH
        before = torch.cuda.memory_allocated()
        try_step(job, adamw(job.model, job.settings), tokens, needs.memory.optimizer)
        assert torch.cuda.memory_allocated() == before, "a trial leaves nothing behind"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["dense", "moe"])
def test_on_a_gpu_the_peak_of_a_step_is_predicted_within_a_tenth(
    tmp_path: Path, config: dict[str, Any], checkpointing: bool
) -> None:
    wide = config | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 8192}
    job = a_job(tmp_path, wide, "cuda", batch_tokens=512 * LENGTH, micro_batch_tokens=256 * LENGTH,
                precision="bfloat16", gradient_checkpointing=checkpointing, compile=False)  # fmt: skip
    needs = needs_of(job)
    job.model.to(job.device)
    optimizer = adamw(job.model, job.settings)
    try_step(job, optimizer, 256 * LENGTH)  # libraries take their workspaces
    torch.cuda.reset_peak_memory_stats()
    try_step(job, optimizer, 256 * LENGTH)
    predicted = needs.memory.peak - needs.memory.optimizer
    assert torch.cuda.max_memory_allocated() == pytest.approx(predicted, rel=0.1)
