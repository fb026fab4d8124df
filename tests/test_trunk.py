"""A trunk: trainings of other lengths with a constant rate take its steps once, and end as if each had been alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from btx.files import file_sha256, link_or_copy, read_json, write_bytes, write_sealed
from btx.metrics_file import read_metrics
from btx.run_folder.folder import RunFolder
from btx.run_folder.trunk import take_trunk, trunk_steps
from btx.sweeps.sharing import take_over
from btx.sweeps.sweep import sweep_state
from btx.sweeps.variants import plan_sweep, without_trunk
from btx.training.checkpoint_files import check_parts
from tests.pico_run import pico_recipe, run_here, stopped_after, write_pico_recipe

TO_THE_SEED = ["data/tokenizer", "data/general", "seed"]
CONSTANT, LONGER = "seed_model.train.schedule=constant", "seed_model.train.tokens=1024"
WSD = ["seed_model.train.schedule=wsd", "seed_model.train.decay_share=0.25"]


def seed_of(folder: Path, name: str, *settings: str, share: Path | None = None) -> tuple[RunFolder, list[str]]:
    """A run up to its seed model, of 512 tokens unless said otherwise; with what it has said."""
    recipe = pico_recipe(folder, name, "seed_model.train.tokens=512", "seed_model.train.warmup_steps=2", *settings)
    lines: list[str] = []
    if share is not None:
        take_over(RunFolder.create(recipe), [share], lines.append)
    run, said = run_here(recipe, TO_THE_SEED)
    return run, lines + said


def weights(run: RunFolder) -> str:
    return file_sha256(run.path / "seed/model/model.safetensors")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_pico_recipe(folder := tmp_path_factory.mktemp("trunk"))
    seed_of(folder, "short", CONSTANT)
    return folder


@pytest.mark.parametrize("settings", [
    pytest.param((CONSTANT, LONGER), marks=pytest.mark.long, id="constant"), pytest.param((*WSD, LONGER), id="wsd"),
])  # fmt: skip
def test_a_longer_training_goes_on_from_a_shorter_one_of_its_trunk_and_ends_as_if_alone(
    here: Path, settings: tuple[str, ...]
) -> None:
    kind = settings[0].split("=")[1]
    alone, _ = seed_of(here, f"{kind}-alone", *settings)
    shared, lines = seed_of(here, f"{kind}-shared", *settings, share=here / "short")
    steps = read_metrics(here / "short/seed/metrics.jsonl")[-1]["step"]
    assert f"seed: goes on from step {steps} of {here / 'short/seed'}, which is the same training until there" in lines
    assert any(line.startswith(f"resumed after step {steps} of {2 * steps}") for line in lines)
    assert weights(shared) == weights(alone)
    losses = [[line["loss"] for line in read_metrics(run.path / "seed/metrics.jsonl")] for run in (shared, alone)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2 * steps


def test_a_training_that_is_behind_its_trunk_or_stale_goes_on_from_it_too(here: Path) -> None:
    """A sweep that was stopped, or whose recipe has changed: what its runs have left does not hide the trunk."""
    settings = ["seed_model.train.tokens=512", "seed_model.train.warmup_steps=2", CONSTANT, LONGER]
    every = "seed_model.train.checkpoint_every=1"
    behind = RunFolder.create(pico_recipe(here, "behind", *settings, every))
    run_here(behind.recipe, TO_THE_SEED[:2])
    stopped_after(behind, "seed", 1)
    seed_of(here, "stale", CONSTANT, LONGER, "seed_model.train.beta2=0.9")  # further, but of another trunk
    alone, _ = seed_of(here, "constant-alone", CONSTANT, LONGER)
    for name in ("behind", "stale"):
        run, lines = seed_of(here, name, CONSTANT, LONGER, every, share=here / "short")
        assert any(line.startswith("seed: goes on from step 2 of") for line in lines)
        assert any(line.startswith("seed: stale (seed_model.train.beta2") for line in lines) == (name == "stale")
        assert any(line.startswith("resumed after step 2 of 4") for line in lines)
        assert weights(run) == weights(alone)
    ahead = RunFolder.create(pico_recipe(here, "ahead", *settings, every))
    run_here(ahead.recipe, TO_THE_SEED[:2])
    stopped_after(ahead, "seed", 3)
    take_over(ahead, [here / "short"], (lines := list[str]()).append)  # whose end is behind what is there
    assert not any("goes on" in line for line in lines)


def test_what_was_set_aside_is_gone_on_with_whoever_was_killed_before_it_was_taken(here: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "short", tmp_path / "run")
    longer = ["seed_model.train.warmup_steps=2", CONSTANT, LONGER]
    run = RunFolder.create(pico_recipe(here, str(tmp_path / "run"), *longer))
    aside = run.set_aside("seed")  # and no further: killed while the checkpoint was hashed
    planned = plan_sweep(
        str(here / "pico.yaml"), [f"data.root={here}", f"run={tmp_path / 'sweep'}", *longer], rng_seeds=1
    )
    assert [row["goes_on"] for row in sweep_state(planned, [run.path])] == [{"seed": 0.5}]
    resumed, lines = run_here(run.recipe, TO_THE_SEED)
    assert f"seed: goes on from step 2 of {aside}, which is the same training until there" in lines
    assert any(line.startswith("resumed after step 2 of 4") for line in lines)
    alone, _ = seed_of(here, "constant-alone", CONSTANT, LONGER)
    assert weights(resumed) == weights(alone)


def test_fewer_tokens_and_then_as_many_as_before_go_on_from_where_the_run_was(here: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "short", tmp_path / "run")
    seed_of(here, str(tmp_path / "run"), CONSTANT, "seed_model.train.tokens=256")
    _, lines = seed_of(here, str(tmp_path / "run"), CONSTANT)
    assert any(line.startswith("seed: goes on from step 2 of") for line in lines)
    assert any(line.startswith("resumed after step 2 of 2") for line in lines)


def test_a_stale_training_loses_nothing_to_another_runs_checkpoint_that_is_further_and_damaged(
    here: Path, tmp_path: Path
) -> None:
    donor, _ = seed_of(here, str(tmp_path / "donor"), CONSTANT, "seed_model.train.tokens=768", share=here / "short")
    (damaged,) = (donor.path / "seed/state").glob("step-00000003/weights.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    shutil.copytree(here / "short", tmp_path / "run")
    _, lines = seed_of(here, str(tmp_path / "run"), CONSTANT, LONGER, share=donor.path)
    assert any("does not go on from step 3" in line for line in lines)
    assert any(line.startswith("resumed after step 2 of 4") for line in lines)


def test_in_one_run_folder_more_tokens_are_more_steps_and_no_new_training(here: Path) -> None:
    seed_of(here, "grows", CONSTANT, share=here / "short")
    grown, lines = seed_of(here, "grows", CONSTANT, LONGER)
    assert any("goes on from step" in line for line in lines)
    alone, _ = seed_of(here, "constant-alone", CONSTANT, LONGER)
    assert weights(grown) == weights(alone)


@pytest.mark.parametrize("settings", [
    (LONGER,), (CONSTANT, LONGER, "seed_model.train.beta2=0.9"), (CONSTANT, "seed_model.train.tokens=256"),
    (CONSTANT, LONGER, "rng_seed=1"), (CONSTANT, LONGER, "seed_model.train.warmup_steps=3"),
], ids=["cosine", "another optimiser", "shorter", "another rng seed", "another warm-up"])  # fmt: skip
def test_a_training_of_another_trunk_begins_anew(here: Path, settings: tuple[str, ...], tmp_path: Path) -> None:
    recipe = pico_recipe(here, str(tmp_path), "seed_model.train.tokens=512", "seed_model.train.warmup_steps=2",
                         *settings)  # fmt: skip
    run, lines = RunFolder.create(recipe), list[str]()
    take_over(run, [here / "short"], lines.append)
    assert not (run.path / "seed/state").exists()
    assert not any("goes on" in line for line in lines)


def test_a_training_that_has_decayed_leaves_the_end_of_its_trunk_to_others(here: Path) -> None:
    decayed, _ = seed_of(here, "decayed", *WSD, LONGER, share=here / "short")
    (state,) = (decayed.path / "seed/state").glob("step-*/state.json")
    (constant,) = (here / "short/seed/state").glob("step-*/state.json")
    assert read_json(state)["trunk"] == read_json(constant)["trunk"] == decayed.graph["seed"].trunk
    assert read_json(state)["step"] == 3  # of 4, one of which is the decay
    other = [CONSTANT, LONGER]
    shared, lines = seed_of(here, "undecayed", *other, share=here / "decayed")
    assert any(line.startswith("resumed after step 3 of 4") for line in lines)
    alone, _ = seed_of(here, "constant-alone", *other)
    assert weights(shared) == weights(alone)
    assert [row["step"] for row in read_metrics(shared.path / "seed/metrics.jsonl")] == [1, 2, 3, 4]


def test_the_steps_on_a_trunk_are_those_before_the_decay(here: Path) -> None:
    def steps(*settings: str) -> int:
        recipe = pico_recipe(here, "steps", "seed_model.train.tokens=1024", *settings)
        return trunk_steps(RunFolder(here / "steps", recipe).graph["seed"].shown)

    whole = steps(CONSTANT)
    assert steps(*WSD) == whole - round(0.25 * whole)
    assert steps() == 0
    assert steps(CONSTANT, "seed_model.train.warmup_steps=1000") == 0


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_of_another_run_is_passed_over(here: Path, tmp_path: Path, file: str) -> None:
    other = Path(shutil.copytree(here / "short", tmp_path / "other"))
    (damaged,) = (other / "seed/state").glob(f"step-*/{file}")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    settings = ["seed_model.train.warmup_steps=2", CONSTANT, LONGER]
    run, lines = RunFolder.create(pico_recipe(here, str(tmp_path / "run"), *settings)), list[str]()
    take_over(run, [other], lines.append)
    assert not list((run.path / "seed").glob("state/*"))
    take_over(run, [other, here / "short"], lines.append)
    assert [path.name for path in (run.path / "seed/state").iterdir()] == ["step-00000002"]
    told = [line for line in lines if "does not go on from step 2" in line]
    assert bool(told) == (file != "state.json")


@pytest.mark.parametrize("why", ["not every process has written its part", "not readable as JSON"])
def test_a_checkpoint_of_several_processes_is_passed_over_without_all_their_parts(tmp_path: Path, why: str) -> None:
    """Parts as `btx.training.checkpoint_files` lays them out, of two processes; in step 4 one is missing or broken."""
    state = tmp_path / "donor/seed/state"
    for step, process in ((2, 0), (2, 1), (4, 0)):
        part = state / f"step-{step:08d}/part-{process:05d}-of-00002"
        hashes = {}
        for name in ("weights.safetensors", "optimizer.safetensors"):
            write_bytes(part / name, b"numbers")
            hashes[name] = file_sha256(part / name)
        write_sealed(part / "state.json", {"step": step, "marks": {}, "sha256": hashes, "trunk": "a"})
    if "JSON" in why:
        write_bytes(state / "step-00000004/part-00001-of-00002/state.json", b"{")
    lines: list[str] = []
    assert take_trunk("a", 4, tmp_path / "run/seed", [state.parent], lines.append)
    assert [path.name for path in (tmp_path / "run/seed/state").iterdir()] == ["step-00000002"]
    assert why in lines[0]


@pytest.mark.parametrize("when", ["before it is copied", "while it is copied"])
def test_a_checkpoint_that_its_owner_removes_meanwhile_gives_way_to_the_one_it_has_then(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A training under way keeps its last checkpoints and removes those before."""
    every = "seed_model.train.checkpoint_every=1"
    settings = ["seed_model.train.tokens=1024", "seed_model.train.warmup_steps=2", CONSTANT, every]
    donor = RunFolder.create(pico_recipe(here, str(tmp_path / "donor"), *settings))
    run_here(donor.recipe, TO_THE_SEED[:2])
    stopped_after(donor, "seed", 3)
    state = donor.path / "seed/state"
    later = (state / "step-00000003").rename(tmp_path / "later")
    copied = link_or_copy

    def pruned(source: Path, target: Path) -> None:
        is_first = later.exists()
        if is_first:
            if when == "while it is copied":
                copied(source, target)
                (target / "optimizer.safetensors").unlink()
            later.rename(state / "step-00000003")
            shutil.rmtree(source)
        if not is_first or when == "before it is copied":
            copied(source, target)

    monkeypatch.setattr("btx.run_folder.trunk.link_or_copy", pruned)
    trunk, lines = donor.graph["seed"].trunk or "", list[str]()
    assert take_trunk(trunk, 4, tmp_path / "run/seed", [donor.path / "seed"], lines.append)
    assert "does not go on from step 2" in lines[0]
    (taken,) = (tmp_path / "run/seed/state").iterdir()
    assert taken.name == "step-00000003"
    check_parts(taken, 1)


def test_a_sweep_begins_with_the_shortest_and_says_what_the_others_need_not_train(here: Path, tmp_path: Path) -> None:
    def goes_on(*settings: str) -> list[tuple[str, dict[str, float]]]:
        arguments = [f"data.root={here}", f"run={tmp_path / 'sweep'}", "seed_model.train.warmup_steps=2", *settings]
        planned = plan_sweep(str(here / "pico.yaml"), arguments, rng_seeds=1)
        return [(row["variant"].split("=")[-1], row["goes_on"]) for row in sweep_state(planned, [here / "short"])]

    tokens = "seed_model.train.tokens=4096,256,2048"
    trunk = [("256", {}), ("2048", {"seed": 0.25}), ("4096", {"seed": 0.5})]  # of 512 tokens there is one
    assert goes_on(CONSTANT, tokens) == trunk
    decays = [CONSTANT.replace("constant", "wsd"), "seed_model.train.decay_share=0.5"]
    assert goes_on(*decays, tokens) == [("256", {}), ("2048", {"seed": 0.25}), ("4096", {"seed": 0.25})]
    assert goes_on(tokens) == [("4096", {}), ("256", {}), ("2048", {})]  # a cosine has no trunk, and keeps the order


def test_a_sweep_begins_with_the_shortest_branch_where_branches_have_their_own_tokens(here: Path) -> None:
    arguments = [f"data.root={here}", "train.schedule=constant", "train.domain_tokens={birds: 4096},{birds: 256}"]
    runs = plan_sweep(str(here / "pico.yaml"), arguments, rng_seeds=1).runs
    assert [run.recipe.branch_training("birds").tokens for run in runs] == [256, 4096]


def test_what_keeps_trainings_of_other_lengths_from_a_trunk_is_named(here: Path) -> None:
    file = here / "derived.yaml"
    file.write_text(
        (here / "pico.yaml").read_text().replace("paper: true", "paper: false").replace("warmup_steps: 2", "")
    )

    def named(*settings: str) -> str:
        return without_trunk(
            plan_sweep(str(file), [f"data.root={here}", "seed_model.train.tokens=512,1024", *settings])
        )

    assert named(CONSTANT) == "seed_model.train.{warmup_steps}"
    assert named(CONSTANT, "seed_model.train.warmup_steps=2") == named() == ""
