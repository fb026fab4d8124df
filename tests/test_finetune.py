"""Finetuning with every router and every choice of what trains: runs, metrics, folders, exact resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from btx.choices.trainable import MOE_TRAINABLE
from btx.data.samples import open_mixtures
from btx.files import read_json
from btx.models.loading import load_model
from btx.moe import routing_metrics
from btx.moe.layer import moe_blocks, weight_parts
from btx.planning.plan import plan
from btx.recipe.loading import RecipeError, load_recipe
from btx.recipe.mixtures import finetune_mixture
from btx.recipe.training import Finetune
from btx.run_folder.folder import RunFolder
from btx.training.optimizer import adamw, set_learning_rate
from tests.pico_run import pico_recipe, run_here, stopped_after, write_pico_recipe

BRANCHED = ["data", "seed", "train/birds", "train/tools"]


@pytest.fixture(scope="module")
def branched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is ready to be mixed."""
    folder = tmp_path_factory.mktemp("branched")
    write_pico_recipe(folder)
    run_here(pico_recipe(folder), BRANCHED)
    return folder


def go_on(branched: Path, name: str, *overrides: str, stages: tuple[str, ...] = ("mix", "finetune")) -> RunFolder:
    """A copy of the branched run, mixed and finetuned with other settings."""
    if not (branched / name).exists():
        shutil.copytree(branched / "run", branched / name, symlinks=True)
    return run_here(pico_recipe(branched, name, *overrides), stages)[0]


def metrics(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "finetune" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("router", [
    pytest.param("switch", marks=pytest.mark.long), pytest.param("sample_top1", marks=pytest.mark.long), "soft",
])  # fmt: skip
def test_every_router_trains_evaluates_analyses_and_saves(branched: Path, router: str) -> None:
    stages = ("mix", "baselines/soup", "finetune", "evaluate", "analyze", *(["report"] * (router == "switch")))
    quick = ("evaluate.tokens=200", "analyze.tokens=200")
    run = go_on(branched, router, f"mix.router={router}", "mix.capacity_factor=0.8", *quick, stages=stages)
    lines = metrics(run)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all((max(line["dropped"]) > 0) == (router == "switch") for line in lines)
    results = read_json(run.path / "evaluate" / "results.json")["models"]
    assert results["btx"]["mean_bits_per_byte"] < results["mix"]["mean_bits_per_byte"]
    routing = read_json(run.path / "analyze" / "routing.json")
    assert all(sum(load) == pytest.approx(1) for found in routing["domains"].values() for load in found["load"])
    (start,), (end,) = ({block.rule.rule.kind for block in moe_blocks(load_model(run.model(stage)))}
                        for stage in ("mix", "finetune"))  # fmt: skip
    assert start == end == ("top_k" if router == "soft" else router)
    config = read_json(run.model("finetune") / "config.json")
    assert (config["model_type"], config["num_experts_per_tok"]) == (
        ("mixtral", 3) if router == "soft" else ("btx_mixtral", "read btx.json")
    )
    card = (run.model("mix") / "README.md").read_text()
    assert ("loads in transformers" in card) == (router == "soft")
    assert ("Only btx reads this folder" in card) == (router != "soft")


@pytest.mark.parametrize("router", [pytest.param("sample_top1", marks=pytest.mark.long), "top_k"])
def test_an_interrupted_finetuning_goes_on_bit_for_bit(
    branched: Path, router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing_metrics, "WATCHED_STEPS", 5)
    monkeypatch.setattr(routing_metrics, "DEAD_LOAD", 0.34)  # so that there are some to tell of
    bias = 0.01 if router == "top_k" else 0.0
    options = (f"mix.router={router}", "mix.temperature_rate=0.05", "finetune.load_balancing_over=global_batch",
               f"finetune.load_balancing_bias={bias}")  # fmt: skip
    whole = go_on(branched, f"whole-{router}", *options)
    cut = go_on(branched, f"cut-{router}", *options)
    state = cut.path / "finetune" / "state"
    shutil.rmtree(cut.path / "finetune" / "model")
    (cut.path / "finetune" / "done.json").unlink()
    for checkpoint in state.iterdir():
        shutil.rmtree(checkpoint)
    before = go_on(branched, f"before-{router}", *options, "finetune.checkpoint_every=4")
    shutil.copytree(_checkpoint_of(before, 4), state / "step-00000004")
    again = go_on(branched, f"cut-{router}", *options, stages=("finetune",))
    assert (again.model("finetune") / "model.safetensors").read_bytes() == (
        whole.model("finetune") / "model.safetensors"
    ).read_bytes()
    timing = ("tokens_per_s", "wall_s")
    kept = [{key: value for key, value in line.items() if key not in timing} for line in metrics(again)]
    assert kept == [{key: value for key, value in line.items() if key not in timing} for line in metrics(whole)]
    assert kept[-1]["dead"]


def _checkpoint_of(run: RunFolder, step: int) -> Path:
    """The checkpoint after `step` steps: the run is done anew from its mix and stopped there."""
    shutil.rmtree(run.path / "finetune")

    stopped_after(run, "finetune", step)
    return run.path / "finetune" / "state" / f"step-{step:08d}"


@pytest.mark.parametrize(("trainable", "trained"), [
    ("all", {"routers", "experts", "shared"}),
    ("all_but_experts", {"routers", "shared"}),
    ("routers", {"routers"}),
    ("shared", {"shared"}),
])  # fmt: skip
def test_what_is_frozen_stays_and_has_no_optimiser_state(branched: Path, trainable: str, trained: set[str]) -> None:
    run = go_on(branched, trainable, f"finetune.trainable={trainable}", f"finetune.tokens={256 * 3}")
    before, after = load_model(run.model("mix")), load_model(run.model("finetune"))
    parts = weight_parts(after)
    assert set(parts.values()) == {"routers", "experts", "shared"}
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new) != (parts[name] in trained), name
    (checkpoint,) = (run.path / "finetune" / "state").iterdir()
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        kept = {name.split("/", 1)[1] for name in file.keys()}  # noqa: SIM118
    assert kept == {name for name, part in parts.items() if part in trained}


def test_frozen_weights_get_no_gradient_in_memory(branched: Path) -> None:
    from btx.models.trainable import set_trainable
    from btx.training.losses import next_token_loss

    run = go_on(branched, "routers", "finetune.trainable=routers", f"finetune.tokens={256 * 3}")
    model = load_model(run.model("mix"))
    set_trainable(model, "routers")
    ids = torch.arange(64).view(2, 32)
    next_token_loss(model.train(), ids, torch.arange(32).expand(2, 32), ids).backward()
    with_gradient = {part for name, part in weight_parts(model).items() if model.get_parameter(name).grad is not None}
    assert with_gradient == {"routers"}


def test_each_part_has_its_own_learning_rate(branched: Path) -> None:
    model = load_model(go_on(branched, "all", f"finetune.tokens={256 * 3}").model("mix"))
    factors = {"routers": 10.0, "experts": 0.5, "shared": 2.0}
    optimizer = adamw(model, Finetune(tokens=1, learning_rate_factors=factors))
    set_learning_rate(optimizer, 1e-3)
    parts = {id(model.get_parameter(name)): part for name, part in weight_parts(model).items()}
    rates = {parts[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {part: pytest.approx(1e-3 * factor) for part, factor in factors.items()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(parts)
    assert all(group["weight_decay"] == 0.1 * (p.ndim > 1) for group in optimizer.param_groups for p in group["params"])


def test_a_dense_router_gradient_costs_what_plan_says(branched: Path) -> None:
    sparse, dense = (
        pico_recipe(branched, "run", f"finetune.dense_router_gradient={value}") for value in ("false", "true")
    )
    costs = [next(row for row in plan(recipe)["stages"] if row["stage"] == "finetune") for recipe in (sparse, dense)]
    one_expert = 3 * 32 * 48 * 2  # three matrices in two layers
    assert costs[1]["flops"] - costs[0]["flops"] == 6 * one_expert * costs[0]["tokens"]
    assert "1.5 times the feed-forward FLOPs" in " ".join(plan(dense)["router"]["notes"])
    run = go_on(branched, "dense", "finetune.dense_router_gradient=true")
    plain = go_on(branched, "plain")
    assert run.done("finetune")["flops"] - plain.done("finetune")["flops"] == 6 * one_expert * costs[0]["tokens"]
    assert run.done("finetune")["active_params"] == plain.done("finetune")["active_params"]


def test_plan_says_what_a_plain_class_cannot_express(branched: Path) -> None:
    told = {
        router: plan(pico_recipe(branched, "run", f"mix.router={router}"))["router"]
        for router in ("top_k", "switch", "sample_top1", "soft")
    }
    assert {name: facts["saved_as"] for name, facts in told.items()} == {
        "top_k": "mixtral", "switch": "btx", "sample_top1": "btx", "soft": "mixtral",
    }  # fmt: skip
    assert {name: facts["experts_per_token"] for name, facts in told.items()} == {
        "top_k": 2, "switch": 1, "sample_top1": 2, "soft": 3,
    }  # fmt: skip
    assert told["top_k"]["notes"] == []
    single = plan(pico_recipe(branched, "run", "mix.top_k=1"))["router"]
    assert "the next-token loss does not train the router" in single["notes"][0]
    assert (
        "from 1 to 0.90"
        in plan(pico_recipe(branched, "run", "mix.router=sample_top1", "mix.temperature_rate=0.018"))["router"][
            "notes"
        ][1]
    )  # 7 steps, exp(-0.018 * 6)
    assert all("only btx reads" in told[name]["notes"][0] for name in ("switch", "sample_top1"))
    assert "k = 3" in told["soft"]["notes"][0]


def test_switch_is_saved_as_a_plain_class_where_one_fits(tmp_path: Path) -> None:
    config = "{model_type: qwen3, hidden_size: 32, num_hidden_layers: 2, intermediate_size: 48, " \
             "num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8, max_position_embeddings: 64}"  # fmt: skip
    recipe = pico_recipe(
        tmp_path,
        "run",
        f"seed_model.config={config}",
        "mix.router=switch",
        f"seed_model.train.tokens={256 * 2}",
        f"train.tokens={256 * 2}",
        f"finetune.tokens={256 * 2}",
    )
    told = plan(recipe)["router"]
    assert told["saved_as"] == "qwen3_moe"
    assert "norm_topk_prob: false" in told["notes"][0]
    run, _ = run_here(recipe, [*BRANCHED, "mix", "finetune"])
    config = read_json(run.model("finetune") / "config.json")
    assert (config["model_type"], config["num_experts_per_tok"], config["norm_topk_prob"]) == ("qwen3_moe", 1, False)
    assert read_json(run.path / "mix" / "mix.json")["config"]["norm_topk_prob"] is False
    assert any(max(line["dropped"]) > 0 for line in metrics(run))


def test_selection_biases_steer_the_finetuning_and_are_in_no_saved_model(branched: Path) -> None:
    options = ("finetune.load_balancing=0", "finetune.load_balancing_bias=0.05")
    notes = plan(pico_recipe(branched, "run", *options))["router"]["notes"]
    assert "biases choose experts in finetuning alone" in notes[0]
    plain, biased = go_on(branched, "no-bias", options[0]), go_on(branched, "bias", *options)
    uneven = [max(max(load) - min(load) for load in metrics(run)[-1]["load"]) for run in (plain, biased)]
    assert uneven[1] < uneven[0]
    checkpoint = max((biased.path / "finetune" / "state").iterdir())
    with safe_open(checkpoint / "weights.safetensors", "pt") as file:
        names = [name for name in file.keys() if "bias" in name]  # noqa: SIM118
        assert all(file.get_tensor(name).any() for name in names)
    assert len(names) == 2
    with safe_open(biased.model("finetune") / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "bias" in name]  # noqa: SIM118


def test_plan_counts_the_bytes_of_the_mixs_type_on_disk(branched: Path) -> None:
    planned = {dtype: plan(pico_recipe(branched, "run", f"mix.dtype={dtype}")) for dtype in ("null", "bfloat16")}
    rows = {dtype: {row["stage"]: row["disk_bytes"] for row in found["stages"]} for dtype, found in planned.items()}
    assert rows["bfloat16"]["mix"] == rows["null"]["mix"] / 2
    assert rows["bfloat16"]["finetune"] == rows["null"]["finetune"] - rows["null"]["mix"] / 2
    assert rows["bfloat16"]["train/birds"] == rows["null"]["train/birds"] > 0


def test_plan_counts_no_gradient_and_no_optimiser_state_for_frozen_weights(branched: Path) -> None:
    model = load_model(go_on(branched, "all", f"finetune.tokens={256 * 3}").model("mix"))
    sizes = dict.fromkeys(("routers", "experts"), 0)
    for name, part in weight_parts(model).items():
        sizes[part] = sizes.get(part, 0) + model.get_parameter(name).numel()
    for trainable, parts in MOE_TRAINABLE.items():
        planned = plan(pico_recipe(branched, "run", f"finetune.trainable={trainable}"))
        row = next(row for row in planned["stages"] if row["stage"] == "finetune")
        total = planned["models"]["btx"]["total_params"]
        sizes["shared"] = total - sizes["routers"] - sizes["experts"]  # the tokenizer came out a little smaller
        trained = sum(sizes[part] for part in parts)
        assert row["disk_bytes"] == 4 * total + 2 * 12 * trained
        if trainable == "all":
            most = row["memory_bytes"]
        assert most - row["memory_bytes"] >= 12 * (total - trained)  # activations that no gradient needs go too


@pytest.mark.parametrize("override", ["mix.router=swich", "mix.capacity_factor=0", "finetune.trainable=router"])
def test_bad_router_settings_are_refused(branched: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=override.split("=")[0].replace(".", r"\.")):
        load_recipe(str(branched / "pico.yaml"), [f"data.root={branched}", override])


@pytest.mark.parametrize(("overrides", "problem"), [
    (("mix.router=soft", "finetune.dense_router_gradient=true"), "dense_router_gradient goes with"),
    (("finetune.trainable=shared", "finetune.dense_router_gradient=true"), "no router trains"),
    (("finetune.load_balancing_bias=0.001", "mix.router=switch"), "goes with mix.router: top_k"),
    (("finetune.load_balancing_bias=0.001", "mix.top_k=3"), "fewer experts"),
    (("finetune.load_balancing_kind=pooled", "finetune.load_balancing_over=global_batch"), "goes with .*paper"),
])  # fmt: skip
def test_settings_that_would_be_ignored_are_refused(branched: Path, overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        pico_recipe(branched, "run", *overrides)


def test_finetuning_can_read_sequences_that_switch_domain(branched: Path) -> None:
    run = go_on(branched, "switching", "finetune.switching=0.5", f"finetune.tokens={256 * 3}")
    recipe, data = run.recipe, run.path / "data"
    switching = open_mixtures(data, recipe, [finetune_mixture(recipe)], switching=0.5)
    assert run.done("finetune")["data"] == switching.fingerprint
    assert switching.fingerprint != open_mixtures(data, recipe, [finetune_mixture(recipe)]).fingerprint
