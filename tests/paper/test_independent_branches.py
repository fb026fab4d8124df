"""The method lets an expert be added, dropped, moved and trained anywhere at any time: so does the program.

One finished run; every test works on a copy of it and says which stages were made anew.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from btx.cli.main import train
from btx.errors import CheckpointError, RunFolderError, UserError
from btx.files import read_json
from btx.process import Interrupts
from btx.recipe.loading import load_recipe
from btx.recipe.schema import Recipe
from btx.run_folder.folder import RunFolder
from btx.stages.adopt import adopt
from btx.stages.work import run_stages
from tests.pico_run import WORDS, finished_here, pico_recipe, run_here, write_pico_recipe
from tests.processes import btx_here

LATER = {"mix", "baselines/soup", "finetune", "evaluate", "analyze", "report"}
LAW = ("data.domains.law=law.jsonl", "train.domains=[birds,tools,law]")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, recipe and a finished run of it."""
    folder = tmp_path_factory.mktemp("finished")
    finished_here(pico_recipe(folder))
    return folder


@pytest.fixture
def here(template: Path, tmp_path: Path) -> Path:
    """A copy of them at another place, all files touched, with a domain `law` beside that the run does not know."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True, copy_function=shutil.copyfile)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text("utf-8").replace(str(template), str(tmp_path)), "utf-8")
    words = [word[::-1] for word in WORDS["tools"]]
    lines = [
        json.dumps({"text": " ".join(words[i * k * k % len(words)] for k in range(40)) + f" {i}"}) for i in range(240)
    ]
    (tmp_path / "law.jsonl").write_text("\n".join(lines), "utf-8")
    return tmp_path


def made(recipe: Recipe) -> set[str]:
    """Run everything but the report; the stages that were made, and the report if it would be."""
    run = RunFolder.create(recipe)
    before = {stage.name: stamp(run, stage.name) for stage in run.graph}
    run_here(recipe, [name for name in before if name != "report"])
    return {name for name, when in before.items() if stamp(run, name) != when} | stale(recipe)


def stamp(run: RunFolder, stage: str) -> Any:
    """When a stage was finished, to the nanosecond."""
    done = run.folder(stage) / "done.json"
    return done.stat().st_mtime_ns if done.is_file() else None


def states(recipe: Recipe) -> dict[str, str]:
    run = RunFolder(Path(recipe.run_folder), recipe)
    return {stage.name: run.state(stage) for stage in run.graph}


def stale(recipe: Recipe) -> set[str]:
    return {name for name, state in states(recipe).items() if state != "done"}


# Adding, dropping, renaming, reordering


def test_a_domain_more_prepares_it_trains_its_expert_and_goes_on_from_the_mix(here: Path) -> None:
    assert made(pico_recipe(here, "run", *LAW)) == {"data/law", "train/law", *LATER}
    routing = read_json(here / "run" / "analyze" / "routing.json")
    assert routing["experts"] == ["birds", "tools", "law", "generalist"]


def test_a_domain_fewer_makes_the_mix_and_what_follows_anew(here: Path) -> None:
    fewer = pico_recipe(here, "run", "train.domains=[birds]")
    assert stale(fewer) == LATER
    gone = pico_recipe(
        here, "run", "train.domains=[birds]", "data.domains={birds: birds.jsonl, general: general.jsonl}"
    )
    assert stale(gone) == LATER


def test_order_names_and_budgets_of_other_domains_leave_a_branch_as_it_is(here: Path) -> None:
    assert stale(pico_recipe(here, "run", "train.domains=[tools,birds]")) == LATER - {"baselines/soup"}
    renamed = "{birds: birds.jsonl, hardware: tools.jsonl, general: general.jsonl}"
    assert stale(pico_recipe(here, "run", f"data.domains={renamed}", "train.domains=[birds,hardware]")) == {
        "data/hardware", "train/hardware", *LATER
    }  # fmt: skip
    assert stale(pico_recipe(here, "run", "data.domains.tools={path: tools.jsonl, max_bytes: 20000}")) == {
        "data/tools", "train/tools", *LATER
    }  # fmt: skip
    assert stale(pico_recipe(here, "run", "train.domain_tokens.tools=2304")) == {"train/tools", *LATER}


@pytest.mark.long
def test_a_renamed_general_domain_leaves_all_models_as_they_are(here: Path) -> None:
    renamed = "{birds: birds.jsonl, tools: tools.jsonl, plain: general.jsonl}"
    other_names = (f"data.domains={renamed}", "data.general=plain")
    assert stale(pico_recipe(here, "run", *other_names)) == {"data/plain", "evaluate", "analyze", "report"}
    assert made(pico_recipe(here, "run", *other_names)) == {"data/plain", "evaluate", "analyze", "report"}
    law = ("data.domains.law=law.jsonl", "train.domains=[birds,tools,law]")
    assert made(pico_recipe(here, "run", *other_names, *law)) == {"data/law", "train/law", *LATER}
    assert stale(pico_recipe(here, "run", *LAW)) == {"evaluate", "analyze", "report"}  # and back


@pytest.mark.parametrize("names", [
    pytest.param({"tools": "hardware"}, marks=pytest.mark.long), {"birds": "tools", "tools": "birds"},
])  # fmt: skip
def test_a_seed_model_of_many_domains_survives_their_new_names(here: Path, names: dict[str, str]) -> None:
    seed = "seed_model.train.mixture={general: 1, birds: 0.5, tools: 0.25}"
    run_here(pico_recipe(here, "mixed", seed), ["data", "seed", "train/birds", "train/tools"])
    files = {names.get(name, name): f"{name}.jsonl" for name in ("birds", "tools", "general")}
    mixture = {names.get(name, name): share for name, share in (("general", 1), ("birds", 0.5), ("tools", 0.25))}
    renamed = pico_recipe(
        here, "mixed", f"seed_model.train.mixture={json.dumps(mixture)}", f"data.domains={json.dumps(files)}",
        f"train.domains={json.dumps([name for name in files if name != 'general'])}",
    )  # fmt: skip
    found = states(renamed)
    assert (found["seed"], found["data/general"]) == ("done", "done")
    assert found.get("train/birds", "done") == ("stale" if "birds" in names else "done")


# Identity by content


def test_time_place_and_what_lies_beside_change_nothing(here: Path) -> None:
    (here / "data").mkdir()
    for name in ("birds", "tools", "general"):
        os.utime(here / f"{name}.jsonl", ns=(0, 0))
        (here / f"{name}.jsonl").rename(here / "data" / f"{name}.jsonl")
    shutil.copy(here / "quiz.jsonl", here / "data")
    (here / "data" / "README.md").write_text("about these files")
    (here / "data" / ".hidden.jsonl").write_text("{")
    assert stale(pico_recipe(here, "run", f"data.root={here / 'data'}")) == set()


def test_a_folder_is_what_its_files_hold_behind_links_too(here: Path) -> None:
    (here / "elsewhere").mkdir()
    (here / "folder").mkdir()
    lines = (here / "birds.jsonl").read_text("utf-8").splitlines(keepends=True)
    (here / "folder" / "a.jsonl").write_text("".join(lines[:100]), "utf-8")
    (here / "elsewhere" / "b.jsonl").write_text("".join(lines[100:]), "utf-8")
    (here / "folder" / "z").symlink_to("../elsewhere")
    recipe = pico_recipe(here, "run", "data.domains.birds=folder")
    assert stale(recipe) >= {"data/birds", "train/birds"}
    run, _ = run_here(recipe, ["data"])
    assert run.done("data/birds")["documents"] == 240
    (here / "folder" / "README.txt").write_text("not a document")
    assert states(pico_recipe(here, "run", "data.domains.birds=folder/**/*.jsonl"))["data/birds"] == "done"
    (here / "elsewhere" / "b.jsonl").write_text("".join(lines[100:]).replace("wren", "tern"), "utf-8")
    opened = RunFolder.open(run.path)
    assert opened.state(opened.graph["data/birds"]) == "stale"
    assert opened.why_stale(opened.graph["data/birds"]) == f"{here / 'folder' / 'z' / 'b.jsonl'} changed"


def test_one_changed_byte_is_noticed_even_if_size_and_time_are_kept(here: Path) -> None:
    file = here / "tools.jsonl"
    before = file.stat()
    assert stale(pico_recipe(here)) == set()
    changed = bytearray(file.read_bytes())
    changed[40] ^= 1
    file.write_bytes(changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert stale(pico_recipe(here)) == {"data/tools", "train/tools", *LATER}


# The run folder travels


def test_a_finished_run_without_its_data_files_is_finished(here: Path) -> None:
    for name in ("birds", "tools", "general", "quiz"):
        (here / f"{name}.jsonl").unlink()
    (here / "run").rename(here / "moved")
    opened = RunFolder.open(here / "moved")
    assert {opened.state(stage) for stage in opened.graph} == {"done"}


@pytest.mark.long
def test_without_its_data_folder_a_run_with_a_later_domain_is_finished_and_prepares_the_same_again(here: Path) -> None:
    recipe = pico_recipe(here, "run", *LAW)
    run_here(recipe)
    tokens = {file: file.read_bytes() for file in (here / "run" / "data").rglob("tokens.bin")}
    shutil.rmtree(here / "run" / "data")
    run = RunFolder.open(here / "run")
    assert stale(recipe) == {stage.name for stage in run.graph.data}
    assert not any(run.is_needed(stage) for stage in run.graph.data)
    run_here(recipe, ["data/tokenizer", "data/law", "data/general", "data/birds", "data/tools"])
    assert {file: file.read_bytes() for file in (here / "run" / "data").rglob("tokens.bin")} == tokens
    assert stale(recipe) == set()


def test_settings_that_can_be_compared_are_compared_where_the_files_are_missing(here: Path) -> None:
    (here / "birds.jsonl").unlink()
    assert stale(pico_recipe(here)) == set()
    for other in ("{path: birds.jsonl, max_bytes: 5000}", "brids.jsonl", "[birds.jsonl, tools.jsonl]"):
        assert "data/birds" in stale(pico_recipe(here, "run", f"data.domains.birds={other}")), other
    assert {"data/birds", "data/tools", "data/general"} <= stale(pico_recipe(here, "run", "data.held_out=0.2"))


def test_an_evaluation_whose_questions_are_missing_is_known_by_their_files_name(here: Path) -> None:
    (here / "quiz.jsonl").unlink()
    assert stale(pico_recipe(here)) == set()
    assert stale(pico_recipe(here, "run", "evaluate.tokens=77")) == {"evaluate", "report"}
    other = pico_recipe(here, "run", "evaluate.tasks.quiz.path=qiuz.jsonl")
    run = RunFolder.create(other)
    assert run.state(run.graph["evaluate"]) == "stale"
    assert "evaluate.tasks.quiz.path" in run.why_stale(run.graph["evaluate"])
    assert "qiuz.jsonl: No such file" in run.why_stale(run.graph["evaluate"])


def test_an_existing_seed_model_that_moved_is_found_again_by_content(here: Path, template: Path) -> None:
    shutil.copytree(template / "run" / "seed" / "model", here / "mine")
    existing = ("seed_model={path: " + str(here / "mine") + "}",)
    run_here(pico_recipe(here, "other", *existing), ["data", "seed", "train/birds"])
    (here / "mine" / "README.txt").write_text("about it")
    (here / "mine").rename(here / "elsewhere")
    recipe = pico_recipe(here, "other", *existing)
    assert states(recipe)["train/birds"] == "done"
    assert states(recipe)["seed"] == "begun"  # its link leads nowhere
    moved = pico_recipe(here, "other", "seed_model={path: " + str(here / "elsewhere") + "}")
    run, _ = run_here(moved, ["seed", "train/tools"])
    assert {run.state(run.graph[name]) for name in ("seed", "train/birds", "train/tools")} == {"done"}
    (here / "elsewhere").rename(here / "mine")
    assert {name for name, state in states(moved).items() if state == "stale"} == set()
    shutil.rmtree(run.folder("train/tools"))
    with pytest.raises(CheckpointError, match=r"elsewhere: there is no such folder; if the model is elsewhere now"):
        train(run.path, "tools")


def test_an_experts_own_needs_are_enough_elsewhere_and_its_folder_comes_back_finished(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = here / "away" / "run"
    run = RunFolder.create(pico_recipe(here, "run", *LAW))
    run_here(run.recipe, ["data"])
    for own in ("recipe.yaml", "seed", "data/tokenizer", "data/law", "data/general"):  # the rsync of docs/data.md
        (away / own).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (run.path / own).is_dir() else shutil.copy
        copy(run.path / own, away / own)
    for name in ("birds", "tools", "general", "law"):
        (here / f"{name}.jsonl").rename(here / "away" / f"{name}.jsonl.away")
    monkeypatch.chdir(here / "away")
    train(away, "law")
    shutil.copytree(away / "train" / "law", run.path / "train" / "law")
    opened = RunFolder.open(run.path)
    assert opened.state(opened.graph["train/law"]) == "done"
    assert opened.done("train/law")["device"] == "cpu"


def test_what_a_branch_needs_and_lacks_is_made_first(here: Path) -> None:
    for name in ("data", "seed", "train"):
        shutil.rmtree(here / "run" / name)
    train(here / "run", "birds")
    opened = RunFolder.open(here / "run")
    finished = {stage.name for stage in opened.graph if opened.state(stage) == "done"}
    assert finished >= {"data/tokenizer", "data/birds", "data/general", "seed", "train/birds"}
    assert not {"data/tools", "train/tools"} & finished


def test_branches_of_another_seed_model_are_not_mixed(here: Path) -> None:
    run = RunFolder.open(here / "run")
    facts = read_json(run.path / "train" / "birds" / "done.json")
    (run.path / "train" / "birds" / "done.json").write_text(json.dumps(facts | {"started_from": "0" * 64}))
    shutil.rmtree(run.path / "mix")
    with pytest.raises(CheckpointError, match="birds started from another seed model"):
        run_stages(RunFolder.open(run.path), ["mix"], Interrupts(), lambda line: None)


# Adoption


def test_an_expert_trained_by_anything_else_can_be_adopted(here: Path) -> None:
    run = RunFolder.create(pico_recipe(here, "run", *LAW))
    mine = here / "mine"
    shutil.copytree(run.model("train/birds"), mine)
    lines: list[str] = []
    adopt(run, "law", mine, lines.append)
    shutil.rmtree(mine)
    assert stale(run.recipe) == {"data/law", *LATER}
    run_here(run.recipe, ["data/law", "mix"])
    opened = RunFolder.open(run.path)
    assert opened.done("train/law")["adopted"]["from"] == str(mine)
    weights = load_file(opened.model("mix") / "model.safetensors")
    assert weights["model.layers.0.block_sparse_moe.experts.2.w1.weight"].equal(
        weights["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    )
    harder = pico_recipe(here, "run", *LAW, "train.learning_rate=5e-3")
    assert states(harder)["train/law"] == "done"  # never silently retrained
    assert states(harder)["train/birds"] == "stale"


def test_what_does_not_fit_is_not_adopted_and_nothing_is_lost(here: Path, make_llama: Any) -> None:
    run = RunFolder.open(here / "run")
    before = (run.model("train/birds") / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="cannot be mixed"):
        adopt(run, "birds", make_llama("other", hidden_size=64), print)
    with pytest.raises(UserError, match=r"no branch 'law'; its train\.domains are: birds, tools"):
        adopt(run, "law", run.model("train/birds"), print)
    assert run.state(run.graph["train/birds"]) == "done"
    assert (run.model("train/birds") / "model.safetensors").read_bytes() == before


# Nothing finished is set aside before its replacement can start


def test_from_another_folder_a_finished_expert_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pico_recipe(here)
    monkeypatch.chdir(here)
    run_here(load_recipe("pico.yaml", ["run=relative"]), ["data", "seed", "train/birds"])
    (here / "empty").mkdir()
    done = btx_here("train", here / "relative", "birds", cwd=here / "empty")
    model = here / "relative" / "train" / "birds" / "model"
    assert done == (0, f"· train/birds: already done, skipped\n· train/birds: done, {model}\n", "")
    assert not (here / "relative" / "stale").exists()


@pytest.mark.parametrize(("stage", "override", "broken"), [
    ("train/birds", "train.learning_rate=1e-4", "seed/model/model.safetensors"),
    ("mix", "mix.top_k=1", "train/tools/model/model.safetensors"),
    ("finetune", "finetune.learning_rate=1e-4", "mix/model/model.safetensors"),
])  # fmt: skip
def test_a_stale_stage_that_cannot_start_stays_where_it_is(here: Path, stage: str, override: str, broken: str) -> None:
    (here / "run" / broken).unlink()
    run = RunFolder.create(pico_recipe(here, "run", override))
    before = stamp(run, stage)
    with pytest.raises((CheckpointError, RunFolderError)):
        run_stages(run, [stage], Interrupts(), lambda line: None)
    assert stamp(run, stage) == before
    assert not (run.path / "stale").exists()


@pytest.mark.parametrize(("file", "text", "stage", "expected"), [
    ("birds.jsonl", '{"text": 3}', "data/birds", "is a int, not a string"),
    ("quiz.jsonl", "broken", "evaluate", "not JSON"),
])  # fmt: skip
def test_what_cannot_be_read_sets_nothing_aside(here: Path, file: str, text: str, stage: str, expected: str) -> None:
    with (here / file).open("a") as opened:
        opened.write(text + "\n" if stage == "data/birds" else "")
    if stage == "evaluate":
        (here / file).write_text(text)
    recipe = pico_recipe(here)
    with pytest.raises(UserError, match=expected):
        run_here(recipe, [stage])
    run = RunFolder.open(here / "run")
    assert run.done(stage)
    assert not (run.path / "stale").exists()


def test_a_run_goes_on_without_an_expert_that_failed(here: Path) -> None:
    shutil.rmtree(here / "run" / "train" / "tools")
    recipe = pico_recipe(here).without(["tools"])
    assert made(recipe) == LATER
    assert read_json(here / "run" / "analyze" / "routing.json")["experts"] == ["birds", "generalist"]
    assert "tools" in read_json(here / "run" / "evaluate" / "results.json")["models"]["btx"]["domains"]
    with pytest.raises(UserError, match="no branch law; there are: birds, tools"):
        pico_recipe(here).without(["law"])
