"""Batch, learning rate, warm-up and checkpoint interval of a recipe that names none of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from btx.errors import RecipeError
from btx.recipe.derived import model_parameters, training_notes
from btx.recipe.loading import dump_recipe, load_recipe
from btx.recipe.schema import Recipe
from btx.run_folder.stages_of_recipe import build_graph

RECIPE = """\
name: my
data:
  sequence_length: 256
  domains: {law: {generate: math}, general: {generate: general}}
seed_model:
  config: {model_type: llama, hidden_size: 128, num_hidden_layers: 3, intermediate_size: 384, num_attention_heads: 8}
  train: {tokens: 1_250_000}
train: {domains: [law], tokens: 250_000}
finetune: {tokens: 450_000}
"""
PAPERS = (4_000_000, 1e-4, 100, 100)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "my.yaml"
    file.write_text(RECIPE + f"run: {tmp_path / 'run'}\n", "utf-8")
    return file


def values(training: Any) -> tuple[int, float, int, int]:
    return training.batch_tokens, training.learning_rate, training.warmup_steps, training.checkpoint_every


def hashes(recipe: Recipe) -> dict[str, str]:
    return {stage.name: stage.inputs for stage in build_graph(recipe)}


def test_what_is_left_out_follows_from_size_and_tokens(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file))
    assert recipe.seed_model.train is not None
    # 0.58 D^0.571 in whole sequences; 1.79 N^-0.713 D^0.307 up to 6e-3, for N = 638,976
    assert values(recipe.seed_model.train) == (1792, 6e-3, 35, 69)
    assert values(recipe.train) == (768, pytest.approx(4e-3, rel=0.05), 17, 32)  # two thirds: feed-forward alone
    assert values(recipe.finetune) == (1024, 2e-3, 22, 44)  # a third
    assert recipe.train.steps(256) == 326


def test_the_paper_and_what_a_recipe_names_stay(recipe_file: Path) -> None:
    papers = load_recipe(str(recipe_file), ["paper=true"])
    assert values(papers.train) == values(papers.finetune) == PAPERS
    assert papers.derived == {}
    named = load_recipe(str(recipe_file), ["train.batch_tokens=4096", "train.learning_rate=1e-5"])
    assert values(named.train) == (4096, 1e-5, 4, 10)
    assert named.derived is not None
    assert named.derived["train"].values.keys() == {"warmup_steps", "checkpoint_every"}


def test_another_versions_rules_change_no_run(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_recipe(str(recipe_file))
    (recipe_file.parent / "run").mkdir()
    (recipe_file.parent / "run" / "recipe.yaml").write_text(dump_recipe(first), "utf-8")
    monkeypatch.setattr("btx.recipe.derived._values", lambda basis, fresh: dict.fromkeys(
        ("batch_tokens", "learning_rate", "warmup_steps", "checkpoint_every"), 1))  # fmt: skip
    assert hashes(load_recipe(str(recipe_file))) == hashes(first)
    more = load_recipe(str(recipe_file), ["finetune.tokens=900_000"])
    assert values(more.finetune) == (1, 1, 1, 1)  # other tokens: the rules of now
    assert values(more.train) == values(first.train)
    assert load_recipe(str(recipe_file.parent / "run")).derived == first.derived


def test_a_run_from_before_the_rules_keeps_the_papers_values(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe_file.parent / "run"
    run.mkdir()
    before = dump_recipe(load_recipe(str(recipe_file), ["paper=true", "train.trainable=feed_forward"]))
    lines = before.replace("paper: true", "paper: false").splitlines()
    (run / "recipe.yaml").write_text("\n".join(line for line in lines if not line.startswith("derived")), "utf-8")
    again = load_recipe(str(recipe_file))
    assert values(again.train) == values(again.finetune) == PAPERS
    assert again.derived is None
    (run / "recipe.yaml").write_text(dump_recipe(again), "utf-8")
    assert values(load_recipe(str(recipe_file)).train) == PAPERS
    monkeypatch.setenv("HOME", str(recipe_file.parent))
    assert values(load_recipe(str(recipe_file), ["run=~/run"]).train) == PAPERS


@pytest.mark.parametrize("basis", ["{}", "{tokens: many}", "{tokens: 100, parameters: few}"])
def test_what_was_derived_is_btxs_to_write(recipe_file: Path, basis: str) -> None:
    derived = f"derived={{train: {{basis: {basis}, values: {{learning_rate: 1.0}}}}}}"
    with pytest.raises(RecipeError, match=r"derived\.train\.basis: not for you to write: leave `derived` out"):
        load_recipe(str(recipe_file), ["paper=true", derived])
    run = recipe_file.parent / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(f"derived: {{train: {{basis: {basis}, values: {{learning_rate: 1.0}}}}}}\n")
    assert values(load_recipe(str(recipe_file)).train)[1] != 1.0  # another's is not taken over


def test_the_size_is_the_folders_or_what_a_hub_name_says(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
              "num_key_value_heads": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    assert model_parameters({"path": str(tmp_path)}) == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert model_parameters({"path": "meta-llama/Llama-3.2-1B"}) == 1_000_000_000
    assert model_parameters({"path": "HuggingFaceTB/SmolLM2-135M-Instruct"}) == 135_000_000
    for nothing in (
        {"path": "org/model"},
        {"path": "org/v2Beta"},
        {"path": 3},
        None,
        {"config": {"hidden_size": "x"}},
        {"config": config | {"hidden_size": 10**400}},
        {"config": config | {"head_dim": -64}},
    ):
        assert model_parameters(nothing) is None


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed_model.train.batch_tokens=2_000_000", "seed_model.train: 1,250,000 tokens are less than one optimiser"),
        ("train.batch_tokens=300_000", "train: 250,000 tokens are less than one optimiser step"),
        ("train.domain_tokens={law: 500}", "train.domain_tokens.law: 500 tokens are less than one optimiser step"),
        (
            "finetune.warmup_steps=1000",
            "finetune: warmup_steps 1,000 of 440 optimiser steps: the learning rate rises to the last one",
        ),
        ("finetune.batch_tokens=100", "finetune: batch_tokens 100 are less than one sequence"),
        ("baseline_training={dense_dm: {tokens: 300}}", "baseline_training.dense_dm: 300 tokens are less than one"),
    ],
)
def test_a_budget_below_a_step_or_its_warm_up_is_told(recipe_file: Path, override: str, told: str) -> None:
    fine = training_notes(load_recipe(str(recipe_file)))
    assert [note.partition(":")[0] for note in fine] == ["seed_model.train", "train", "finetune"]  # what was filled in
    assert any(note.startswith(told) for note in training_notes(load_recipe(str(recipe_file), [override])))
