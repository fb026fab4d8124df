"""Baselines: the run's own training path from other starts, matched by tokens or FLOPs, resumed and counted exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from btx.baselines.matching import scaled_steps
from btx.baselines.settings import phases_of
from btx.choices.baselines import BASELINES
from btx.data.samples import open_mixtures
from btx.errors import RecipeError, UserError
from btx.files import read_json
from btx.models.loading import load_model
from btx.moe.layer import moe_blocks
from btx.planning.plan import plan
from btx.process import Interrupts
from btx.recipe.mixtures import domain_mixture, finetune_mixture
from btx.run_folder.folder import RunFolder
from btx.run_folder.stages_of_recipe import build_graph
from btx.run_folder.threads import jobs_at_once, training_threads
from btx.stages.work import run_stages
from tests.pico_run import pico_recipe, run_here, stopped_after, write_pico_recipe

MADE = list(BASELINES)
ALL = f"baselines=[{','.join(MADE)}]"
LITTLE = ("evaluate.tasks={}", "evaluate.tokens=200",
          "seed_model.train.tokens=1024", "train.tokens=1024", "finetune.tokens=1024",
          *(f"{stage}.checkpoint_every=3" for stage in ("seed_model.train", "train", "finetune")))  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with every baseline."""
    folder = tmp_path_factory.mktemp("baselines")
    write_pico_recipe(folder)
    recipe = pico_recipe(folder, "run", ALL, *LITTLE)
    return run_here(recipe, [stage.name for stage in build_graph(recipe)][:-2])[0]  # neither analyzed nor reported


@pytest.fixture(scope="module")
def results(finished: RunFolder) -> dict[str, Any]:
    return read_json(finished.path / "evaluate" / "results.json")["models"]


def other(finished: RunFolder, name: str, *overrides: str) -> RunFolder:
    """A copy of the run as it was before its baselines, with other settings."""
    target = finished.path.parent / name
    shutil.copytree(finished.path, target, symlinks=True, ignore=shutil.ignore_patterns("baselines"))
    return RunFolder.create(pico_recipe(target.parent, name, ALL, *LITTLE, *overrides))


# What a run makes


def test_every_baseline_is_a_stage_and_a_row_between_soup_and_mix(finished: RunFolder, results: dict[str, Any]) -> None:
    assert list(results) == ["seed", "expert/birds", "expert/tools", *MADE, "mix", "btx"]
    for name in MADE:
        assert (finished.path / "baselines" / name / "done.json").is_file()
        assert (finished.path / "baselines" / name / "model" / "tokenizer.json").is_file()
    starts = {"seed": results["seed"], "upcycled": results["seed"], "mix": results["mix"]}
    for name, kind in BASELINES.items():
        if kind.trains and name != "btx_routers_only":  # a few steps of the routers alone change next to nothing
            assert results[name]["mean_bits_per_byte"] < starts[kind.start]["mean_bits_per_byte"], name


def test_rows_say_what_a_model_cost_predicted_and_measured(finished: RunFolder, results: dict[str, Any]) -> None:
    planned = plan(finished.recipe)
    assert planned["speed"]["source"] == "as measured in seed"
    assert list(planned["models"]) == list(results)
    for name, row in results.items():
        assert {"machine_hours", "peak_memory_bytes", "inference_flops_per_token", "predicted"} <= row.keys()
        assert row["predicted"]["tokens"] == row["tokens"], name
        assert row["predicted"]["flops"] == pytest.approx(row["flops"], rel=0.01), name  # the vocabulary is smaller
        assert row["predicted"]["memory_bytes"] < row["peak_memory_bytes"] < 64e9, name
        assert ("matched" in row) == (name in MADE)
        for field in ("total_params", "active_params", "inference_flops_per_token"):
            assert planned["models"][name][field] == pytest.approx(row[field], rel=0.02), (name, field)
        for field in ("hours", "machine_hours"):
            assert row["predicted"][field] == pytest.approx(planned["models"][name][field]), (name, field)
    assert results["seed"]["predicted"]["hours"] == pytest.approx(results["seed"]["hours"], rel=0.02)  # by definition
    done = {stage: finished.done(stage)["wall_s"] / 3600 for stage in ("train/birds", "train/tools", "finetune")}
    assert results["btx"]["machine_hours"] == pytest.approx(sum(done.values()))
    assert results["btx"]["hours"] == pytest.approx(max(done["train/birds"], done["train/tools"]) + done["finetune"])
    for name in MADE:
        matched = results[name]["matched"]
        assert matched["flops_ratio"] == pytest.approx(results[name]["flops"] / results["btx"]["flops"])
        assert matched["hours_ratio"] == pytest.approx(results[name]["machine_hours"] / results["btx"]["machine_hours"])
    assert results["btx_soft"]["inference_flops_per_token"] > results["btx"]["inference_flops_per_token"]
    assert results["btx_switch"]["inference_flops_per_token"] < results["btx"]["inference_flops_per_token"]


def test_compute_matched_baselines_cost_the_runs_flops_within_half_a_step(
    finished: RunFolder, results: dict[str, Any]
) -> None:
    for name in ("dense_cm", "upcycling_cm"):
        done = [finished.done(f"baselines/{name}{phase}") for phase in ("_domains", "")]
        step = done[1]["flops"] / done[1]["steps"]
        assert abs(results[name]["flops"] - results["btx"]["flops"]) <= step / 2
        dm = [finished.done(f"baselines/{name.replace('cm', 'dm')}{phase}") for phase in ("_domains", "")]
        factor = results["btx"]["flops"] / results[name.replace("cm", "dm")]["flops"]
        assert done[0]["steps"] == round(factor * dm[0]["steps"])
        assert done[1]["steps"] == pytest.approx(factor * dm[1]["steps"], abs=1.01)  # takes up the first's rounding
    for name, kind in BASELINES.items():
        if kind.matched_by == "tokens":
            assert results[name]["tokens"] == results["btx"]["tokens"]


@pytest.mark.parametrize("name", ["dense_dm", "upcycling_dm"])
def test_data_matched_baselines_see_the_runs_sequences_in_the_runs_order(finished: RunFolder, name: str) -> None:
    data, recipe = finished.path / "data", finished.recipe
    branches = [open_mixtures(data, recipe, [domain_mixture(recipe, domain)]) for domain in recipe.train.domains]
    together = open_mixtures(data, recipe, [domain_mixture(recipe, domain) for domain in recipe.train.domains])
    first, last = (finished.done(f"baselines/{name}{phase}") for phase in ("_domains", ""))
    assert first["data"] == together.fingerprint
    assert last["data"] == finished.done("finetune")["data"]
    assert last["data"] == open_mixtures(data, recipe, [finetune_mixture(recipe)]).fingerprint
    samples = first["tokens"] // recipe.data.sequence_length
    seen = together.batch(0, samples)
    for number, branch in enumerate(branches):
        trained = finished.done(f"train/{recipe.train.domains[number]}")["tokens"] // recipe.data.sequence_length
        alone = branch.batch(0, trained)
        for array in ("input_ids", "labels", "position_ids"):
            assert np.array_equal(getattr(seen, array)[number::2], getattr(alone, array))
    part = together.batch(3, 4)
    assert np.array_equal(part.input_ids, seen.input_ids[3:7])


def test_upcycling_starts_as_the_seed_model_with_random_routers(finished: RunFolder) -> None:
    import torch

    seed, start = load_model(finished.model("seed")), load_model(finished.model("baselines/upcycled"))
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        assert torch.allclose(seed(ids).logits, start(ids).logits, atol=1e-4)
    lines = (finished.path / "baselines" / "upcycling_dm_domains" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["load_balancing"] > 0 for line in lines)


def test_what_a_baseline_changes_is_all_that_changes(finished: RunFolder) -> None:
    def weights(stage: str) -> dict[str, Any]:
        return load_file(finished.model(stage) / "model.safetensors")

    mixed = weights("mix")
    for name, moves in {
        "btx_frozen_experts": lambda tensor: ".experts." not in tensor,
        "btx_routers_only": lambda tensor: tensor.endswith("gate.weight"),
        "btx_no_balancing": lambda tensor: True,
    }.items():
        after = weights(f"baselines/{name}")
        assert all(mixed[tensor].equal(after[tensor]) != moves(tensor) for tensor in mixed), name
    lines = (finished.path / "baselines" / "btx_no_balancing" / "metrics.jsonl").read_text().splitlines()
    own = (finished.path / "finetune" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] == json.loads(own[0])["loss"]  # same start, same data, same random numbers
    for name, routed in {"btx_soft": ("mixtral", 3), "btx_switch": ("btx_mixtral", "read btx.json")}.items():
        config = read_json(finished.model(f"baselines/{name}") / "config.json")
        assert (config["model_type"], config["num_experts_per_tok"]) == routed
    kinds = {name: {block.rule.rule.kind for block in moe_blocks(load_model(finished.model(f"baselines/{name}")))}
             for name in ("btx_switch", "btx_sample_top1")}  # fmt: skip
    assert kinds == {"btx_switch": {"switch"}, "btx_sample_top1": {"sample_top1"}}


def test_a_baseline_stopped_in_either_phase_goes_on_bit_for_bit(finished: RunFolder) -> None:
    run = other(finished, "stopped")
    lines: list[str] = []
    shared, *phases = [stage.name for stage in run.graph.baseline_stages(["upcycling_cm"])]
    run_stages(run, [shared], Interrupts(), lines.append)
    for stage, steps in zip(phases, (4, 3), strict=True):
        stopped_after(run, stage, steps)
        assert not run.done(stage)
        run_stages(run, [stage], Interrupts(), lines.append)
        one, two = (load_file(made.model(stage) / "model.safetensors") for made in (finished, run))
        assert all(one[name].equal(two[name]) for name in one), stage
    assert sum("resumed after step 3" in line for line in lines) == 2, lines


@pytest.mark.parametrize(("overrides", "experts"), [
    (["mix.split=2", "mix.generalist=false", "mix.router=soft"], 4),
    pytest.param(["mix.blend=true"], 3, marks=pytest.mark.long),
])  # fmt: skip
def test_baselines_have_the_shape_of_the_runs_mix(finished: RunFolder, overrides: list[str], experts: int) -> None:
    run = other(finished, f"shape-{experts}", *overrides, "train.tokens=256", "finetune.tokens=256")
    names = ["upcycling_cm", "btx_switch"]
    run_stages(run, ["train/birds", "train/tools", "mix"], Interrupts(), lambda line: None)
    run_stages(run, [stage.name for stage in run.graph.baseline_stages(names)], Interrupts(), lambda line: None)
    mixed = {tensor: value.shape for tensor, value in load_file(run.model("mix") / "model.safetensors").items()}
    for name in names:
        made = load_file(run.model(f"baselines/{name}") / "model.safetensors")
        assert {tensor: value.shape for tensor, value in made.items()} == mixed
        assert {block.num_experts for block in moe_blocks(load_model(run.model(f"baselines/{name}")))} == {experts}
    planned = plan(run.recipe)["baselines"]["upcycling_cm"]["matched"]
    assert planned["flops_ratio"] == pytest.approx(1, abs=0.25)


# Before anything runs


def test_every_baseline_is_described() -> None:
    assert all(kind.summary.endswith(".") and kind.label for kind in BASELINES.values())


def test_plan_predicts_every_baseline(tmp_path: Path) -> None:
    planned = plan(pico_recipe(tmp_path, "run", ALL, "finetune.batch_tokens=128"))
    assert list(planned["baselines"]) == MADE
    rows = {row["stage"]: row for row in planned["stages"]}
    for name in ("dense_cm", "upcycling_cm"):
        step = rows[f"baselines/{name}"]["flops"] / rows[f"baselines/{name}"]["steps"]
        run = sum(rows[stage]["flops"] for stage in ("train/birds", "train/tools", "finetune"))
        found = planned["baselines"][name]
        assert abs(found["flops"] - run) <= step / 2
        assert found["matched"] == {"to": "btx", "by": "flops", "flops_ratio": found["flops"] / run}
        assert found["memory_bytes"] > 0
        assert found["disk_bytes"] > 0
    assert rows["baselines/dense_dm_domains"]["mixture"] == pytest.approx(
        {"birds": 0.45, "tools": 0.45, "general": 0.1}
    )
    assert rows["baselines/btx_soft"]["flops"] > rows["finetune"]["flops"] > rows["baselines/btx_switch"]["flops"]


def test_scaled_steps_keep_the_proportion_and_spend_the_budget() -> None:
    assert scaled_steps([100, 50], [2.0, 4.0], 800.0) == [200, 100]
    assert scaled_steps([3, 5], [7.0, 2.0], 46.6) == [5, 6]  # 5 x 7 leave 11.6, which is 5.8 steps
    assert scaled_steps([100, 1], [1.0, 1.0], 1.0) == [1, 1]


def test_the_branches_settings_train_the_first_phase_and_the_finetunings_the_last(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "run", ALL, "train.trainable=feed_forward", "finetune.load_balancing=0.02",
                         "baseline_training.dense_dm={learning_rate: 7e-4, domains_learning_rate: 9e-4}",
                         "baseline_training.btx_soft={tokens: 1024, load_balancing: 0.5}")  # fmt: skip
    first, last = phases_of(recipe, "dense_cm")
    assert (first.settings.learning_rate, last.settings.learning_rate) == (2e-3, 1e-3)
    assert (first.settings.tokens, first.settings.trainable, first.settings.load_balancing) == (4096, "all", 0.0)
    first, last = phases_of(recipe, "dense_dm")
    assert (first.settings.learning_rate, last.settings.learning_rate) == (9e-4, 7e-4)
    first, last = phases_of(recipe, "upcycling_dm")
    assert first.settings.load_balancing == last.settings.load_balancing == 0.02
    (only,) = phases_of(recipe, "btx_soft")
    assert only.settings.load_balancing == 0.5
    planned = plan(recipe)
    assert next(row["tokens"] for row in planned["stages"] if row["stage"] == "baselines/btx_soft") == 1024
    assert planned["baselines"]["btx_soft"]["matched"]["by"] == "recipe"


def test_a_baseline_that_is_the_run_itself_is_noted(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "run", ALL, "mix.router=soft", "finetune.load_balancing=0")
    notes = " ".join(plan(recipe)["router"]["notes"])
    assert "btx_soft is the run itself" in notes
    assert "btx_no_balancing is the run itself" in notes
    assert "btx_routers_only" not in notes


def test_exactly_what_a_setting_decides_becomes_stale(tmp_path: Path) -> None:
    def changed(*overrides: str) -> set[str]:
        before, after = (
            {stage.name: stage.inputs for stage in build_graph(pico_recipe(tmp_path, "run", ALL, *more))}
            for more in ((), overrides)
        )
        return {name.removeprefix("baselines/") for name in before if before[name] != after[name]} - {
            "evaluate", "report", "analyze",
        }  # fmt: skip

    of_the_mix = {name for name, kind in BASELINES.items() if kind.start == "mix"}
    assert changed("finetune.load_balancing=0.5") == {
        "finetune", "upcycling_dm_domains", "upcycling_dm", "upcycling_cm_domains", "upcycling_cm",
        *of_the_mix - {"btx_no_balancing"},
    }  # fmt: skip
    assert changed("mix.router_init=zeros") == {"mix", "finetune", *of_the_mix}
    assert changed("baseline_training.dense_cm.learning_rate=0.1") == {"dense_cm_domains", "dense_cm"}
    assert {"dense_cm_domains", "upcycling_cm_domains"} <= changed("mix.top_k=1")
    assert not {"dense_dm_domains", "dense_dm"} & changed("mix.top_k=1", "mix.merge=seed")
    matched = {"dense_cm_domains", "dense_cm", "upcycling_cm_domains", "upcycling_cm"}
    for frozen in ("train.trainable=feed_forward", "finetune.trainable=routers"):  # then the run costs less
        found = changed(frozen)
        assert matched <= found
        assert not {"dense_dm_domains", "dense_dm", "upcycling_dm"} & found
    assert {"upcycling_dm_domains", "upcycling_dm"} <= changed("finetune.load_balancing_bias=0.001")
    assert not changed("finetune.checkpoint_every=1", "train.checkpoint_every=1")


def test_without_the_soup_there_is_none(tmp_path: Path) -> None:
    graph = build_graph(pico_recipe(tmp_path, "run", "baselines=[]"))
    assert not graph.baselines
    assert [stage.name for stage in graph.jobs()[7]] == ["mix", "finetune"]


def test_baselines_are_processes_that_share_the_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from btx.run_folder import threads

    monkeypatch.setattr(threads, "processors", lambda: 12)
    recipe = pico_recipe(tmp_path, "run", "baselines=[soup,upcycling_cm,dense_dm,upcycling_dm,btx_soft]")
    names = [[stage.name.removeprefix("baselines/") for stage in job] for job in build_graph(recipe).jobs()]
    assert names[7:-1] == [
        ["mix", "soup", "finetune"],
        ["upcycled", "upcycling_cm_domains", "upcycling_cm"],
        ["dense_dm_domains", "dense_dm"],
        ["upcycling_dm_domains", "upcycling_dm"],
        ["btx_soft"],
    ]
    graph = build_graph(recipe)
    assert (jobs_at_once(graph), training_threads(graph)) == (2, 6)  # two branches
    wide = build_graph(pico_recipe(tmp_path, "run", "launch.jobs=9", "baselines=[dense_dm,btx_soft]"))
    assert (jobs_at_once(wide), training_threads(wide)) == (3, 4)


@pytest.mark.parametrize("settings", [
    ("train.schedule=wsd", "baseline_training.dense_cm.decay_share=0.5"),
    ("finetune.schedule=wsd", "baseline_training.btx_soft.decay_share=0.5"),
    ("baseline_training.dense_cm={schedule: wsd, decay_shape: linear}",),
])  # fmt: skip
def test_a_baseline_that_decays_says_how(tmp_path: Path, settings: tuple[str, ...]) -> None:
    assert pico_recipe(tmp_path, "run", *settings).baseline_training


@pytest.mark.parametrize(("override", "expected"), [
    ("baselines=[soup,dens_dm]", r"baselines.1: expected one of soup, .*got 'dens_dm'; did you mean 'dense_dm'\?"),
    ("baselines=[soup,dense_dm,soup]", "baselines: soup is named twice"),
    ("baseline_training.dense_cn.tokens=5", r"baseline_training.*got 'dense_cn'; did you mean 'dense_cm'\?"),
    ("baseline_training.dense_cm.lerning_rate=1", r"unknown key 'lerning_rate'; did you mean 'learning_rate'\?"),
    ("baseline_training.soup.tokens=5", "soup is made without training; these are trained: dense_dm, "),
    ("baseline_training.dense_dm.load_balancing=1", "dense_dm is dense, it has no routers to balance"),
    ("baseline_training.btx_soft.domains_learning_rate=1", "btx_soft has one phase; set learning_rate"),
    ("baseline_training.dense_cm.decay_share=0.5", "dense_cm.decay_share goes with schedule: wsd; here it is cosine"),
    ("baseline_training.btx_soft={schedule: constant, decay_shape: linear}", "decay_shape goes with .* it is constant"),
    ("baseline_training.btx_no_balancing.load_balancing=1", "btx_no_balancing is the baseline without it"),
])  # fmt: skip
def test_impossible_baselines_are_refused(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        pico_recipe(tmp_path, "run", override)


def test_a_refusal_names_the_place_in_the_file(tmp_path: Path) -> None:
    path = write_pico_recipe(tmp_path)
    text = path.read_text("utf-8") + "baseline_training:\n  btx_sample_top1:\n    domains_learning_rate: 1e-3\n"
    path.write_text(text, "utf-8")
    line = len(text.splitlines())
    with pytest.raises(RecipeError, match=rf"pico\.yaml:{line}:\d+: baseline_training.btx_sample_top1.domains_learn"):
        pico_recipe(tmp_path)


def test_more_tokens_than_the_data_bear_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "run", "baselines=[dense_dm]", "baseline_training.dense_dm.tokens=20_000_000")
    with pytest.raises(UserError, match=r"baseline dense_dm = .* epochs, at most"):
        run_here(recipe, ["data", "seed"])
    assert not (tmp_path / "run" / "seed").exists()


def test_only_a_runs_own_baselines_can_be_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no baseline 'dense_cm'; its `baselines` are: soup"):
        build_graph(pico_recipe(tmp_path)).baseline_stages(["dense_cm"])


def test_baselines_switch_domain_in_training_as_the_finetuning_does(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "run", ALL, "finetune.switching=0.25")
    for name, kind in BASELINES.items():
        shares = [phase.settings.switching for phase in phases_of(recipe, name)]
        assert shares == ([0.0, 0.25] if kind.two_phases else [0.25] if kind.trains else [])
