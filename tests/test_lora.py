"""Branches that train adapters (`train.trainable: lora`): plain models at the end, merged and resumed exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from btx.errors import CheckpointError, RecipeError, UserError
from btx.models.adapters import add_adapters, merge_adapters
from btx.models.configs import read_config
from btx.models.cost import config_cost, model_cost
from btx.models.loading import load_model
from btx.planning.costs import dense_config, stage_trainings
from btx.planning.plan import plan
from btx.process import Interrupts
from btx.run_folder.folder import RunFolder
from btx.running import preflight
from btx.stages.adopt import adopt
from btx.stages.train import branch
from btx.stages.work import run_stages
from tests.adapters import write_adapter
from tests.pico_run import pico_recipe, run_here, stopped_after
from tests.test_adapters import merged_here, same_weights
from tests.test_families import logits, make

LORA = ["train.trainable=lora", "train.lora.rank=4", "train.lora.alpha=6", "train.learning_rate=1e-2"]
NEEDS_PEFT = 'needs pip install "branchtrainmix[lora]"'


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico run up to its seed model."""
    folder = tmp_path_factory.mktemp("lora")
    run_here(pico_recipe(folder, "run", *LORA), ["data", "seed"])
    return folder


def last_checkpoint(run: RunFolder, domain: str) -> dict[str, torch.Tensor]:
    """The weights in a branch's newest checkpoint."""
    folder = run.folder(f"train/{domain}") / "state"
    return load_file(sorted(folder.glob("step-*"))[-1] / "weights.safetensors")


def test_a_lora_branch_becomes_a_plain_model_and_resumes_bit_for_bit(seeded: Path) -> None:
    pytest.importorskip("peft", reason=NEEDS_PEFT)
    run = RunFolder.open(seeded / "run")
    run_stages(run, ["train/birds"], Interrupts(), lambda line: None)
    seed, expert = (load_file(run.model(stage) / "model.safetensors") for stage in ("seed", "train/birds"))
    assert seed.keys() == expert.keys()
    adapters = last_checkpoint(run, "birds")
    assert all(".lora_A." in name or ".lora_B." in name for name in adapters)
    for name in seed:
        module = name.removesuffix(".weight")
        if ".mlp." in name:
            a, b = (adapters[f"{module}.lora_{letter}.default.weight"] for letter in "AB")
            assert b.abs().max() > 0
            assert torch.equal(expert[name], seed[name] + (b @ a) * (6 / 4)), name
        else:
            assert torch.equal(expert[name], seed[name]), name
    whole = seeded / "whole"
    shutil.move(run.folder("train/birds"), whole)
    stopped_after(run, "train/birds", 5)
    run_stages(RunFolder.open(run.path), ["train/birds"], Interrupts(), lambda line: None)
    assert same_weights(run.model("train/birds"), whole / "model")


@pytest.mark.parametrize(("dense", "config"), [
    ("phi3", {}), ("granite", {}), ("llama", {"tie_word_embeddings": True})
])  # fmt: skip
def test_adapters_go_on_every_ff_projection_and_come_off_again(
    tmp_path: Path, dense: str, config: dict[str, bool]
) -> None:
    pytest.importorskip("peft", reason=NEEDS_PEFT)
    model = load_model(make(tmp_path / "seed", dense, config))
    before, said = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model)
    add_adapters(model, 4, 8.0, rng_seed=0)
    assert torch.equal(logits(model), said), "it starts as the seed model"
    trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name.removesuffix(".weight") for name in before if ".mlp." in name}
    planned = config_cost(read_config(tmp_path / "seed"), trainable="lora", lora_rank=4)
    assert planned == model_cost(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    adapted = logits(model)
    merge_adapters(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert {name for name in before if not torch.equal(after[name], before[name])} == {f"{m}.weight" for m in trained}
    assert (logits(model) - adapted).abs().max() < 1e-4 * adapted.abs().max()


def test_a_plan_of_lora_branches_counts_the_adapters_alone_and_needs_no_peft(
    seeded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    recipe = pico_recipe(seeded, "run", *LORA, "train.lora.rank=2")
    preflight.preflight(recipe)
    assert plan(recipe)["stages"]
    config = dense_config(RunFolder(seeded / "run", recipe))
    adapters = 2 * 3 * 2 * (32 + 48)  # layers, projections, rank, in and out
    assert sum(config_cost(config, trainable="lora", lora_rank=2).shape.trained.values()) == adapters
    all_weights = config_cost(config).total_params
    seed, birds = (stage_trainings(recipe, config)[stage].memory.memory for stage in ("seed", "train/birds"))
    saved = seed.state - birds.state
    assert saved == 12 * all_weights - 16 * adapters
    with pytest.raises(UserError, match=r'not installed: pip install "branchtrainmix\[lora\]"'):
        preflight.check_packages(recipe)
    preflight.check_packages(pico_recipe(seeded, "run", "train.trainable=all"))


def test_the_size_of_an_adapter_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train.lora goes with train.trainable: lora"):
        pico_recipe(tmp_path, "run", "train.lora.rank=4")


def test_branches_start_from_the_same_adapters_with_the_same_rng_seed(seeded: Path) -> None:
    pytest.importorskip("peft", reason=NEEDS_PEFT)
    run = RunFolder.open(seeded / "run")
    state = torch.get_rng_state()
    one, other = (dict(branch(run).named_parameters()) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapter_is_adopted_as_its_merged_model(seeded: Path, tmp_path: Path) -> None:
    run = RunFolder.open(seeded / "run")
    adapter = write_adapter(tmp_path / "tools", run.model("seed"), base_model_name_or_path="org/base")
    lines: list[str] = []
    adopt(run, "tools", adapter, lines.append)
    assert any("was trained on org/base; taken to be the same as" in line for line in lines)
    merged = merged_here(run.model("seed"), adapter, tmp_path / "merged", 2.0)
    assert same_weights(run.model("train/tools"), merged)
    assert (run.model("train/tools") / "tokenizer.json").is_file()
    opened = RunFolder.open(run.path)
    assert opened.state(opened.graph["train/tools"]) == "done"
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="without its weights"):
        adopt(run, "tools", adapter, lines.append)
