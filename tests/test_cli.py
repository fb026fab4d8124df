"""The command line: every command runs, reading ones print JSON, exit codes are 0, 1 and 2, nothing is written in vain.

Commands are called as `btx` calls them, in this process; two real processes show that nothing is lost on the way.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
import yaml

from btx import __version__
from btx.cli import main as cli
from btx.cli.catalogue import CATALOGUE
from btx.cli.run_folders import show_results
from btx.cli.terminal import prepare_streams
from btx.errors import UserError
from btx.models.seed_config import seed_config
from btx.planning.speed import training_speed
from btx.process import SAVE_AND_END
from btx.recipe.loading import load_recipe, packaged_recipes
from btx.reporting.run_files import read_run
from btx.run_folder.folder import RunFolder
from btx.serving.sampling import check_prompt
from tests.pico_run import pico_recipe, run_here, write_pico_recipe

pytestmark = pytest.mark.usefixtures("figures_drawn_once")
COMMANDS = "run sweep plan status ls cp train mix finetune baselines evaluate analyze report chat".split()


@dataclass
class Done:
    """What a command left."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Btx = Callable[..., Done]


@pytest.fixture(scope="module", autouse=True)
def own_signals() -> Iterator[None]:
    """Commands install handlers of their own; the tests' come back afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, SAVE_AND_END)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def call(capture: pytest.CaptureFixture[str], *arguments: str | Path) -> Done:
    old, sys.argv = sys.argv, ["btx", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = old
    captured = capture.readouterr()
    assert isinstance(code, int), code
    return Done(code, captured.out, captured.err)


@pytest.fixture
def btx(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Btx:
    """btx("status", folder) → its exit code and output, of a terminal 200 characters wide."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: call(capsys, *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stages up to the experts were made here, one by one, by hand."""
    folder = tmp_path_factory.mktemp("by-hand")
    made = RunFolder.create(pico_recipe(folder))
    for arguments in (["prepare"], ["train", "seed"], ["train", "tools"], ["train", "birds"]):
        sys.argv = ["btx", arguments[0], str(made.path), *arguments[1:]]
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
    return made.path


@pytest.fixture(scope="module")
def finished(run: Path) -> Path:
    """The same run, to the end."""
    for command in ("mix", "finetune", "evaluate", "analyze"):
        sys.argv = ["btx", command, str(run)]
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
    run_here(RunFolder.open(run).recipe, ["report"])
    return run


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


# What is there


def test_help_names_every_command_in_a_real_process() -> None:
    done = subprocess.run([sys.executable, "-m", "btx", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    named = re.findall(r"^│ (\w+) {2,}\S", done.stdout, re.MULTILINE)
    assert set(COMMANDS) <= set(named), named
    assert not {"work", "run-of-sweep"} & set(named)  # for launchers, not for people


def test_help_groups_the_commands_in_the_order_of_the_method() -> None:
    panels = [(command.rich_help_panel, command.hidden) for command in cli.app.registered_commands]
    named = list(dict.fromkeys(panel for panel, hidden in panels if not hidden))
    assert named == ["Run", "Steps", "Mix anybody's models", "Look", "Talk", "Share"]


@pytest.mark.parametrize("command", [*COMMANDS, "prepare"])
def test_every_command_explains_itself(btx: Btx, command: str) -> None:
    done = btx(command, "--help")
    assert done.code == 0
    assert f"Usage: btx {command}" in done.out


def test_the_version_is_the_packages(btx: Btx) -> None:
    assert btx("--version").out == f"btx {__version__}\n"


@pytest.mark.parametrize("what", CATALOGUE)
def test_ls_lists_everything_there_is_to_choose_from(btx: Btx, what: str) -> None:
    found = btx("ls", what, "--json").json()
    assert found
    shown = btx("ls", what).out
    assert all(name in shown for name in found)


def test_h_is_help_and_the_shell_completes(btx: Btx, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for command in ([], ["plan"], ["mix"], ["init"], ["chat"]):
        assert btx(*command, "-h").out == btx(*command, "--help").out != ""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("typer._completion_shared._get_shell_name", lambda: "bash")
    assert btx("--install-completion").code == 0
    (installed,) = (file for file in tmp_path.rglob("btx.sh"))
    assert "_btx_completion" in installed.read_text("utf-8")


def test_the_families_fit_into_a_hundred_columns(btx: Btx, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, widest in (("200", 100), ("80", 80)):
        monkeypatch.setenv("COLUMNS", columns)
        assert max(map(len, btx("ls", "families").out.splitlines())) <= widest


# Recipes


@pytest.fixture
def with_its_files(tmp_path: Path, make_llama: Callable[..., Path]) -> Callable[[str], list[str]]:
    """Tiny files where a packaged recipe wants data or a model of the user; returns the overrides that name them."""

    def make(name: str) -> list[str]:
        recipe = load_recipe(name)
        sources = [source.path for domain in recipe.data.domains.values() for source in domain.sources]
        wanted = [*sources, *(domain.held_out for domain in recipe.data.domains.values()),
                  *(task.path for task in recipe.evaluate.tasks.values())]  # fmt: skip
        for path in [tmp_path / "data" / path for path in wanted if path is not None]:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = b'{"text": "a document", "prompt": "1 + 1?", "answer": "2"}\n'
            path.write_bytes(gzip.compress(text) if path.name.endswith(".gz") else text)
        mine = [f"seed_model.path={make_llama('mine', max_position_embeddings=4096)}"] if recipe.seed_model.path else []
        alone = ["launch.processes=1", "launch.nodes=1"]  # hours are those of one GPU
        return [f"data.root={tmp_path / 'data'}", f"run={tmp_path / 'run'}", *mine, *alone]

    return make


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_opens_with_its_command_cost_and_result_and_can_be_planned(
    btx: Btx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_its_files: Callable[[str], list[str]], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert btx("cp", name, "mine.yaml").code == 0
    text = Path("mine.yaml").read_text("utf-8")
    opening = [line for line in text.splitlines() if not line.startswith("#  ")][:3]  # without continued lines
    assert [line.split()[1] for line in opening] == ["btx", "Cost:", "Expect:"]
    assert opening[0].startswith((f"# btx run {name}", f"# btx sweep {name}"))
    overrides = with_its_files(name)
    before = files(tmp_path)
    planned = btx("plan", "mine.yaml", *overrides, "--flops-per-second", "1e10", "--json").json()
    assert files(tmp_path) == before
    assert planned["totals"]["tokens"] > 0
    assert planned["totals"]["flops"] > 1e9
    assert planned["totals"]["machine_hours"] == pytest.approx(planned["totals"]["flops"] / 3.6e13)
    assert planned["models"]["btx"]["total_params"] > planned["models"]["seed"]["total_params"]
    assert {"data/tokenizer", "data/general", "seed", "mix", "finetune", "evaluate"} <= {
        stage["stage"] for stage in planned["stages"]
    }


def test_the_papers_recipe_has_the_papers_numbers_and_is_planned_without_network_and_data(btx: Btx) -> None:
    planned = btx("plan", "llama2-7b-paper", "--json").json()
    assert round(planned["models"]["btx"]["total_params"] / 1e9, 1) == 19.7
    assert round(planned["models"]["btx"]["active_params"] / 1e9, 1) == 11.1
    tokens = {stage["stage"]: stage["tokens"] for stage in planned["stages"]}
    # Whole steps of 1024 sequences of 4096 tokens: the paper's numbers but for half a step.
    for stage, billions in (("train/math", 201), ("train/code", 210), ("train/wiki", 42), ("finetune", 80)):
        assert tokens[stage] == pytest.approx(billions * 1e9, rel=1e-4)
    mixture = next(stage["mixture"] for stage in planned["stages"] if stage["stage"] == "finetune")
    assert mixture == pytest.approx({"math": 0.3016, "code": 0.4031, "wiki": 0.103, "general": 0.1923})
    assert planned["speed"]["source"].startswith("one H100")
    recipe, train = planned["recipe"], planned["recipe"]["train"]
    assert (train["learning_rate"], train["weight_decay"], train["replay"]) == (1e-4, 0.1, 0)
    assert (recipe["mix"]["top_k"], recipe["finetune"]["load_balancing"]) == (2, 0.01)
    assert [source["weight"] for source in recipe["data"]["domains"]["math"]["sources"]] == [
        13.57, 54.27, 27.14, 2.99, 5.01
    ]  # fmt: skip


def test_plan_shows_recipe_models_and_stages_and_leaves_nothing(
    btx: Btx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = btx("plan", "demo")
    assert done.code == 0
    for word in ("train/knowledge", "baselines/soup", "FLOPs", "6·N", "active parameters", "absent", "timed just now",
                 "btx plan demo --recipe", "generated: code"):  # fmt: skip
        assert word in done.out
    assert "sequence_length" not in done.out
    assert done.err.startswith("timing a few training steps: 5 seconds at most")
    recipe = load_recipe("demo").model_dump(mode="json")
    assert yaml.safe_load(btx("plan", "demo", "--recipe").out) == recipe
    assert btx("plan", "demo", "--recipe", "--json").json() == recipe
    assert not list(tmp_path.iterdir())


def test_plan_looks_into_the_data_and_refuses_what_is_wrong_there(btx: Btx, tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    lines = (tmp_path / "birds.jsonl").read_text("utf-8").splitlines()
    arguments = ["plan", tmp_path / "pico.yaml", f"data.root={tmp_path}", "--flops-per-second", "1e9"]
    birds, *_ = btx(*arguments, "--json").json()["data"]
    assert (birds["files"], birds["columns"], birds["held_out"]) == (1, ["text"], "5% of the documents")
    assert birds["documents"] == pytest.approx(240, rel=0.15)
    assert birds["estimated"]
    (tmp_path / "birds.jsonl").write_text("\n".join(lines[:3]), "utf-8")
    few = btx(*arguments, "--json").json()["data"][0]
    assert (few["documents"], few["estimated"]) == (3, False)
    assert few["text"] == sum(len(json.loads(line)["text"]) for line in lines[:3])
    assert few["epochs"] == pytest.approx(256 * 8 * 0.9 / few["tokens"])
    scarce = btx(*arguments, "train.tokens=1e6", "--json").json()
    assert any(note.startswith("domain 'birds': about") for note in scarce["notes"])
    (tmp_path / "birds.jsonl").write_text('{"body": "a"}\n', "utf-8")
    refused = btx(*arguments)
    assert refused.code == 2
    assert "birds.jsonl, line 1: no key 'text'; keys there: 'body'" in refused.err


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_timing_ends_when_its_time_is_up(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []

    def timed(recipe: Any, config: dict[str, Any], device: Any, tokens: int, length: int) -> float:
        steps.append((tokens, config["num_hidden_layers"]))
        return seconds or 1e-9

    monkeypatch.setattr("btx.planning.speed._step_seconds", timed)
    recipe = load_recipe("demo", ["train.micro_batch_tokens=1024", "train.batch_tokens=1024"])
    assert training_speed(recipe, seed_config(recipe), torch.device("cpu"), 1) is not None
    assert steps == ([(64, 1)] if seconds else [(64, 1), (256, 1), (1024, 1), (1024, 3)])


def test_plan_says_what_fits_into_a_gpu_and_what_makes_the_rest_fit(btx: Btx, tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    arguments = ["plan", tmp_path / "pico.yaml", f"data.root={tmp_path}", "finetune.micro_batch_tokens=256",
                 "--flops-per-second", "1e10"]  # fmt: skip
    gpu = btx(*arguments, "--gpu-memory", "80GiB", "--json").json()["gpu"]
    assert gpu["memory_bytes"] == 80 * 2**30
    assert [row["stage"] for row in gpu["stages"]] == ["seed", "train/birds", "train/tools", "finetune"]
    for row in gpu["stages"]:
        assert row["fits"]
        assert row["change"] == {}
        assert row["memory_bytes"] == row["memory_bytes_after"] == sum(row["parts"].values())
    most = gpu["stages"][-1]["memory_bytes"]
    small = f"{(most - 1000 + 600_000_000) / 0.97:.0f}"  # what is left beside CUDA's share is a little too small
    row = btx(*arguments, "--gpu-memory", small, "--json").json()["gpu"]["stages"][-1]
    assert not row["fits"]
    assert row["section"] == "finetune"
    assert row["change"] == {"micro_batch_tokens": 128}
    assert row["micro_batch_tokens_after"] == 128
    assert row["memory_bytes_after"] < most - 1000
    assert "finetune.micro_batch_tokens: 128" in btx(*arguments, "--gpu-memory", small).out
    assert btx(*arguments, "--json").json()["gpu"] is None  # the recipe trains on a CPU


@pytest.mark.parametrize("size", ["24", "much", "24XB", "1e400", "-3GB", "", "24 GB GB"])
def test_what_is_no_memory_of_a_gpu_is_refused_at_once(btx: Btx, size: str) -> None:
    refused = btx("plan", "demo", f"--gpu-memory={size}")
    assert refused.code == 2
    assert "write it as 24GB, 80GiB or 24e9" in refused.err


def test_the_memory_planned_is_that_of_all_branches_at_once(btx: Btx, tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    arguments = ["plan", tmp_path / "pico.yaml", f"data.root={tmp_path}", "--flops-per-second", "1e10", "--json"]
    together, alone = btx(*arguments).json(), btx(*arguments, "launch.jobs=1").json()
    branch = next(stage["memory_bytes"] for stage in alone["stages"] if stage["stage"] == "train/birds")
    assert together["totals"]["memory_bytes"] == max(2 * branch, alone["totals"]["memory_bytes"])


@pytest.mark.parametrize(("override", "expected"), [
    ("seed_model.config.hiden_size=32", "unknown key 'hiden_size'; did you mean 'hidden_size'?"),
    ("seed_model.config.hidden_size=33", "transformers cannot build this model"),
    ("seed_model.config.hidden_size=abc", "transformers cannot build this model"),
    ("seed_model.config.model_type=gpt2", "families: "),
])  # fmt: skip
def test_a_seed_model_that_cannot_be_built_is_refused_when_planning(
    btx: Btx, tmp_path: Path, override: str, expected: str
) -> None:
    write_pico_recipe(tmp_path)
    refused = btx("plan", tmp_path / "pico.yaml", f"data.root={tmp_path}", override)
    assert refused.code == 2
    assert refused.err.startswith("error: seed_model.config")
    assert expected in refused.err


def test_a_sweep_says_before_it_starts_what_is_shared_and_what_it_costs_and_writes_nothing(
    btx: Btx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pico_recipe(tmp_path)
    before = files(tmp_path)
    arguments = ["sweep", "pico.yaml", "data.root=.", "mix.top_k=1,2", "--rng-seeds", "2", "--dry-run"]
    found = btx(*arguments, "--json").json()
    assert [(run["variant"], run["rng_seed"]) for run in found["runs"]] == [
        ("mix.top_k=1", 3), ("mix.top_k=2", 3), ("mix.top_k=1", 4), ("mix.top_k=2", 4)
    ]  # fmt: skip
    first, second = (run["stages"] for run in found["runs"][:2])
    assert set(first.values()) == {"absent"}
    assert {name for name, state in second.items() if state == "shared"} >= {
        "data/tokenizer",
        "data/birds",
        "seed",
        "train/birds",
    }
    assert second["finetune"] == "absent"
    shared = sum(run["flops"] for run in found["runs"])
    assert found["flops"] == shared < found["flops_without_sharing"]
    shown = btx(*arguments).out
    assert "mix.top_k=2" in shown
    assert "without sharing" in shown
    for wrong, expected in (
        ("mix.top_k=1,9", "error: variant mix.top_k=9: "),
        ("seed_model.config.hidden_size=32,33", "variant seed_model.config.hidden_size=33"),
    ):
        refused = btx("sweep", "pico.yaml", "data.root=.", wrong)
        assert (refused.code, expected in refused.err) == (2, True), refused.err
    refused = btx("sweep", "pico.yaml", "data.root=.", "--models", "btx,dense")
    assert refused.code == 2
    assert "no variant has a model 'dense'; there are: seed" in refused.err
    assert files(tmp_path) == before


def test_the_status_of_a_sweep_has_a_line_a_run(btx: Btx, finished: Path, tmp_path: Path) -> None:
    runs = [{"rng_seed": 3, "folder": str(finished)}, {"rng_seed": 4, "folder": str(tmp_path / "absent")}]
    (tmp_path / "sweep.json").write_text(json.dumps({"variants": {"mix.top_k=1": {"runs": runs}}}))
    done, absent = btx("status", tmp_path, "--json").json()
    assert done["stages"]["finetune"] == "done"
    assert absent["stages"] == {}
    assert "mix.top_k=1" in btx("status", tmp_path).out


def test_an_unknown_key_gives_file_line_and_suggestion_and_exit_code_2(tmp_path: Path) -> None:
    path = write_pico_recipe(tmp_path)
    lines = path.read_text("utf-8").replace("learning_rate:", "learning_rte:", 1).splitlines()
    path.write_text("\n".join(lines), "utf-8")
    number = next(i for i, line in enumerate(lines, 1) if "learning_rte" in line)
    before = files(tmp_path)
    command = [sys.executable, "-m", "btx", "run", "pico.yaml", "data.root=."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.match(rf"error: pico\.yaml:{number}:\d+: seed_model\.train\.learning_rte: unknown key", done.stderr)
    assert "did you mean 'learning_rate'?" in done.stderr
    assert files(tmp_path) == before


def test_a_copied_recipe_is_named_with_its_path(btx: Btx, tmp_path: Path) -> None:
    assert f"btx plan {tmp_path / 'demo.yaml'}" in btx("cp", "demo", tmp_path).out
    again = btx("cp", "demo", tmp_path)
    assert again.code == 2
    assert "is not overwritten" in again.err


# Stages by hand


def test_branches_are_trained_by_hand_in_any_order(btx: Btx, run: Path) -> None:
    for domain in ("tools", "birds"):
        assert (run / "train" / domain / "model" / "model.safetensors").is_file()
        printed = btx("train", run, domain).out
        assert f"train/{domain}: already done, skipped" in printed
        assert f"train/{domain}: done, {run}/train/{domain}/model" in printed
    unknown = btx("train", run, "birsd")
    assert unknown.code == 2
    assert "train/birds" in unknown.err


def test_status_has_a_line_for_every_stage(btx: Btx, run: Path) -> None:
    rows = {row["stage"]: row for row in btx("status", run, "--json").json()}
    assert rows["seed"]["state"] == "done"
    assert rows["seed"]["step"] == rows["seed"]["steps"] == 10
    shown = btx("status", run).out
    assert all(name in shown for name in rows)


def test_status_says_which_stage_is_stale_and_why(btx: Btx, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other, symlinks=True)
    text = (other / "recipe.yaml").read_text("utf-8")
    (other / "recipe.yaml").write_text(text.replace("replay: 0.1", "replay: 0.2"), "utf-8")
    rows = {row["stage"]: row for row in btx("status", other, "--json").json()}
    assert rows["train/birds"]["state"] == "stale"
    assert rows["train/birds"]["why"] == "train.replay: 0.1 → 0.2"
    assert "train.replay" in btx("status", other).out


def test_the_stages_after_the_branches_leave_results_routing_and_report(btx: Btx, finished: Path) -> None:
    results = btx("evaluate", finished, "--json").json()
    assert results == json.loads((finished / "evaluate" / "results.json").read_text("utf-8"))
    assert set(results["models"]) >= {"seed", "expert/birds", "expert/tools", "soup", "mix", "btx"}
    assert "expert/birds" in btx("evaluate", finished).out
    oracle = json.loads((finished / "mix" / "oracle.json").read_text("utf-8"))
    run = RunFolder.open(finished)
    assert oracle["text"] == {domain: run.graph[f"data/{domain}"].inputs for domain in ("birds", "tools", "general")}
    routing = btx("analyze", finished, "--json").json()
    assert routing["experts"] == ["birds", "tools", "generalist"]
    assert btx("analyze", finished).code == 0
    page = btx("report", finished, "--json").json()["report"]
    assert Path(page) == finished / "report" / "index.html"
    assert btx("report", finished).out.strip() == page


def test_what_was_measured_of_models_of_before_is_said_to_be_so(
    btx: Btx, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    text = (path / "recipe.yaml").read_text("utf-8")
    assert text.count("merge: mean") == 1
    (path / "recipe.yaml").write_text(text.replace("merge: mean", "merge: ties"), "utf-8")
    page = Path(btx("report", path, "--json").json()["report"])
    line = "Results, costs and answers below are of models that were there before: evaluate is stale (mix changed"
    for written in (page.read_text("utf-8"), page.with_name("report.md").read_text("utf-8")):
        assert line in written
    told = json.loads((path / "mix" / "oracle.json").read_text("utf-8"))
    assert read_run(path, {"evaluate": "mix changed"}).oracle == told != read_run(path).oracle, "the newer one"
    assert "evaluate is stale (mix changed" in btx("compare", path).err
    assert "evaluate is stale (mix changed" in RunFolder.open(path)._repr_html_()
    show_results(RunFolder.open(path))
    shown = capsys.readouterr().out
    assert "evaluate: stale (mix changed" in shown
    assert "expert/birds" not in shown
    assert f"{page} (stale, of the results of before)" in shown.replace("\n", "")


def test_a_report_shows_another_run_beside_it_and_refuses_one_that_has_nothing_to_show(
    btx: Btx, finished: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(finished, tmp_path / "later", symlinks=True)
    page = Path(btx("report", finished, "--with", other, "--json").json()["report"])
    assert f'value="{other}"' in page.read_text("utf-8"), "it is among the models to be chosen"
    shutil.rmtree(other / "evaluate")  # the tokens need the analysis alone
    assert btx("report", finished, "--with", other).code == 0
    assert f'value="{other}"' in page.read_text("utf-8")
    before = page.read_bytes()

    def refused(message: str, run: Path = finished, beside: Path = other) -> None:
        done = btx("report", run, "--with", beside)
        assert (done.code, done.out) == (2, "")
        assert done.err.count("\n") == 1
        assert message in done.err, done.err

    refused("no such run folder", beside=tmp_path / "nowhere")
    refused("neither a run folder (recipe.yaml is missing) nor an analysed model's", beside=tmp_path)
    tokens = json.loads((other / "analyze" / "tokens.json").read_text("utf-8"))
    for example in tokens["examples"]:
        example["tokens"] = [f" {number}" for number in range(len(example["tokens"]))]
    (other / "analyze" / "done.json").unlink()
    (other / "analyze" / "tokens.json").write_text(json.dumps(tokens), "utf-8")
    refused(f"{other}: its analysis shows no text that {finished} shows too")
    shutil.rmtree(other / "analyze")
    refused(f"{other}: its analysis shows no tokens")
    refused(f"{other}: its analysis shows no tokens", run=other, beside=finished)
    assert page.read_bytes() == before
    assert btx("report", finished).code == 0


def test_running_a_finished_run_folder_skips_everything_and_shows_the_results(btx: Btx, finished: Path) -> None:
    before = {path: time for path, time in files(finished).items() if path.endswith(".safetensors")}
    done = btx("run", finished)
    assert done.code == 0, done.err
    assert done.out.count("already done, skipped") >= 9
    assert "bits per byte" in done.out
    assert {path: time for path, time in files(finished).items() if path.endswith(".safetensors")} == before


def test_chat_completes_with_a_run_or_a_model_folder_and_names_experts_in_json(btx: Btx, finished: Path) -> None:
    arguments = ["--prompt", "the heron", "--max-new-tokens", "4"]
    told = btx("chat", finished, *arguments, "--json").json()
    assert told["experts"] == ["birds", "tools", "generalist"]
    assert [token["text"] for token in told["tokens"] if token["from_prompt"]]
    assert all(len(token["experts"]) in (0, 2) for token in told["tokens"])
    assert btx("chat", finished / "finetune" / "model", *arguments).out == told["completion"] + "\n"
    assert "birds + generalist" in btx("chat", finished, *arguments, "--show-experts").out
    dense = btx("chat", finished / "seed" / "model", *arguments, "--json").json()
    assert dense["experts"] is None
    assert btx("chat", finished, "--json").code == 2


def test_mix_works_on_any_folders(btx: Btx, finished: Path, tmp_path: Path) -> None:
    birds, tools = (f"--expert={name}={finished / 'train' / name / 'model'}" for name in ("birds", "tools"))
    done = btx("mix", "--seed-model", finished / "seed" / "model", birds, tools, "-o", tmp_path / "moe")
    assert done.code == 0, done.err
    assert "3 experts, top-2" in done.out
    again = btx("mix", "--seed-model", finished / "seed" / "model", birds, tools, "-o", tmp_path / "moe")
    assert again.code == 2
    assert "exists already" in again.err


# Exit codes


@pytest.mark.parametrize("arguments", [
    ["status", "nowhere"], ["train", "nowhere", "math"], ["finetune", "nowhere"], ["evaluate", "nowhere"],
    ["analyze", "nowhere", "--json"], ["report", "nowhere"], ["chat", "nowhere", "--prompt", "x"], ["mix", "nowhere"],
    ["mix"], ["mix", "--seed-model", "s", "--expert", "a", "-o", "x"], ["ls", "nothing"], ["cp", "dmo", "x.yaml"],
    ["plan", "demo", "--flops-per-second", "nan"], ["watch", "x", "--every", "nan"], ["chat", "x", "--rng-seed", "-1"],
    ["compare", "x", "--rng-seed", str(2**32)], ["mix", "--rng-seed", str(10**20)], ["extend", "x", "--rng-seed", "-1"],
    ["run", "dmo"], ["plan", "demo", "mix.top_k=9"], ["run", "demo", "--until", "dinner"], ["frobnicate"], ["run"],
])  # fmt: skip
def test_the_users_mistakes_exit_with_2_and_one_message_and_write_nothing(
    btx: Btx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = btx(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_standard_input_gives_any_bytes_which_a_prompt_then_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nmore\n"), "utf-8"))
    prepare_streams()
    with pytest.raises(UserError, match="its character 4 is"):
        check_prompt(sys.stdin.readline())
    assert sys.stdin.readline() == "more\n"


def test_a_failure_exits_with_1(btx: Btx, run: Path, tmp_path: Path) -> None:
    source = run.parent  # its data are prepared already
    hot = ["seed_model.train.learning_rate=1e30", "seed_model.train.warmup_steps=0"]
    other = RunFolder.create(load_recipe(str(source / "pico.yaml"), [f"data.root={source}", f"run={tmp_path}/r", *hot]))
    shutil.copytree(run / "data", other.folder("data"))
    failed = btx("train", other.path, "seed")
    assert failed.code == 1
    assert re.search(r"error: step \d+: the loss is .* Last good checkpoint: ", failed.err)
    rows = {row["stage"]: row for row in btx("status", other.path, "--json").json()}
    assert rows["seed"]["state"] == "failed"
    assert f"error: {rows['seed']['why']}\n" == failed.err
    assert rows["seed"]["step"] > 0
    assert {row["state"] for row in rows.values()} == {"done", "failed", "absent"}
    assert "failed: step" in btx("status", other.path).out


# Where it prints

READING = [
    ["--help"], ["mix", "--help"], *(["ls", what] for what in CATALOGUE), ["status", "RUN"], ["compare", "RUN"],
    ["plan", "RUN", "--flops-per-second", "1e9"], ["run", "RUN"], ["train", "RUN", "birds"], ["analyze", "RUN"],
    ["chat", "RUN", "--prompt", "€ → ·", "--max-new-tokens", "20"],
    ["chat", "RUN", "--prompt", "a", "--show-experts", "--temperature", "3", "--max-new-tokens", "20"],
    ["ls", "€"], ["status", "/nowhere/€"], ["run", "RUN", "train.replay=€"],
]  # fmt: skip


def opened(path: Path | int, encoding: str) -> TextIO:
    return open(path, "w", encoding=encoding)


@pytest.mark.parametrize("arguments", READING, ids=" ".join)
def test_every_command_prints_in_any_encoding_and_ends_quietly_without_a_reader(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    said = [str(finished) if text == "RUN" else text for text in arguments]
    monkeypatch.setattr(sys, "argv", ["btx", *said])
    codes = {}
    for encoding in ("ascii", "cp1252", "utf-8", "no reader", "full"):
        if encoding == "no reader":
            reading, writing = os.pipe()
            os.close(reading)
        with contextlib.suppress(BrokenPipeError), (  # of closing it
            opened(writing, "utf-8") if encoding == "no reader" else
            opened(Path("/dev/full"), "utf-8") if encoding == "full" else opened(tmp_path / encoding, encoding)
        ) as out, opened(tmp_path / "err", "ascii") as err, monkeypatch.context() as streams:  # fmt: skip
            streams.setattr(sys, "stdout", out)
            streams.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        codes[encoding], told = ended.value.code, (tmp_path / "err").read_text("ascii")
        told = told.replace(f"{finished}: the model of finetune\n", "")  # what chat remarks of a run
        if encoding == "full" and codes["utf-8"] == 0:
            assert told.strip() == "error: standard output cannot be written (No space left on device)", told
            assert codes[encoding] == 1
        elif codes["utf-8" if encoding == "no reader" else encoding] == 0:
            assert told == ""
        else:
            assert told.count("error: ") == 1 or "Usage" in told
            assert codes[encoding] == 2
    assert codes["ascii"] == codes["cp1252"] == codes["utf-8"]


@pytest.mark.parametrize(
    ("variables", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_of_a_command_wait_briefly_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], spins: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["btx", "--version"])
    monkeypatch.setattr("btx.cli.main.end", lambda *_, **__: None)
    cli.main()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
