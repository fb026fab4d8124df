"""A whole run: what it leaves, that it skips, notices stale stages and refuses company."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from btx.errors import CheckpointError, NotYet, RunFolderError
from btx.files import read_json
from btx.planning.plan import plan
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.stages_of_recipe import build_graph
from btx.running import pipeline
from btx.stages.seed import check_planned
from tests.pico_run import pico_recipe, run_here, write_pico_recipe
from tests.processes import btx_here


def btx(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "btx", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=150)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run made by the command line, with its processes, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    write_pico_recipe(folder)
    code, printed, errors = btx_here("run", "pico.yaml", "data.root=.", cwd=folder)
    assert code == 0, printed + errors
    return folder / "runs" / "pico", printed


def test_one_command_goes_from_nothing_to_a_report(finished: tuple[Path, str]) -> None:
    run, printed = finished
    for stage in (
        "data/tokenizer",
        "data/birds",
        "data/general",
        "seed",
        "train/birds",
        "train/tools",
        "mix",
        "finetune",
        "evaluate",
        "analyze",
        "report",
    ):
        assert (run / stage / "done.json").is_file(), stage
    assert (run / "report" / "index.html").stat().st_size > 10_000
    assert "bits per byte" in printed
    assert str(Path("runs") / "pico" / "report" / "index.html") in printed


def test_status_says_that_every_file_was_verified(finished: tuple[Path, str]) -> None:
    code, printed, errors = btx_here("status", finished[0], "--verify", cwd=finished[0])
    assert code == 0, printed + errors
    assert "verified: every file of the 13 finished stages is as it was written" in errors


def test_results_have_the_documented_fields(finished: tuple[Path, str]) -> None:
    models = read_json(finished[0] / "evaluate" / "results.json")["models"]
    assert list(models) == ["seed", "expert/birds", "expert/tools", "soup", "mix", "btx"]
    for model in models.values():
        assert set(model["domains"]) == {"birds", "tools", "general"}
        for measured in model["domains"].values():
            assert {"bits_per_byte", "stderr", "tokens", "bytes"} <= measured.keys()
        assert {"exact_match", "stderr"} <= model["tasks"]["quiz"].keys()
        assert {"mean_bits_per_byte", "flops", "tokens", "hours", "active_params", "total_params"} <= model.keys()
    assert models["btx"]["total_params"] > models["btx"]["active_params"] > models["seed"]["active_params"]
    assert models["btx"]["tokens"] == 2 * 256 * 8 + 256 * 7


def test_routing_shares_sum_to_one(finished: tuple[Path, str]) -> None:
    routing = read_json(finished[0] / "analyze" / "routing.json")
    assert routing["experts"] == ["birds", "tools", "generalist"]
    for domain in routing["domains"].values():
        assert len(domain["load"]) == routing["layers"] == 2
        assert all(sum(layer) == pytest.approx(1.0, abs=1e-3) for layer in domain["load"])


def test_every_step_of_finetuning_is_recorded(finished: tuple[Path, str]) -> None:
    lines = [json.loads(line) for line in (finished[0] / "finetune" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 8))
    for line in lines:
        assert {"loss", "load_balancing", "load", "tokens_per_s", "flops", "learning_rate", "grad_norm"} <= line.keys()
        assert all(sum(layer) == pytest.approx(1.0, abs=1e-2) for layer in line["load"])


@pytest.mark.long
def test_the_model_generates_in_a_process_that_never_imports_btx(finished: tuple[Path, str]) -> None:
    program = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"path = {str(finished[0] / 'finetune' / 'model')!r}\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)\n"
        "ids = tokenizer('the heron', return_tensors='pt')\n"
        "out = model.generate(**ids, max_new_tokens=5, do_sample=False)\n"
        "assert out.shape[1] > ids['input_ids'].shape[1]\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'btx']\n"
        "print(type(model).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "MixtralForCausalLM", done.stderr


def test_a_finished_run_is_skipped_and_says_so(finished: tuple[Path, str]) -> None:
    run = finished[0]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    code, printed, errors = btx_here("run", "pico.yaml", "data.root=.", cwd=run.parent.parent)
    assert code == 0, errors
    for stage in ("seed", "train/birds", "finetune", "evaluate"):
        assert f"{stage}: already done, skipped" in printed
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before


def test_a_stale_domain_that_nothing_needs_is_not_said_to_be_made(finished: tuple[Path, str]) -> None:
    run = finished[0]
    code, printed, errors = btx_here(
        "run", "pico.yaml", "data.root=.", "data.domains.birds=nowhere.txt", cwd=run.parent.parent
    )
    assert code == 0, errors
    assert "data/birds: stale, but nothing needs it (domain 'birds': " in printed
    _, printed, _ = btx_here("status", str(run), cwd=run.parent.parent)
    assert "to do: nothing; stays: " in printed
    code, _, errors = btx_here("run", "pico.yaml", "data.root=.", cwd=run.parent.parent)
    assert code == 0, errors


def test_a_changed_recipe_names_the_stale_stages_and_why(tmp_path: Path) -> None:
    run, _ = run_here(pico_recipe(tmp_path), ["data", "seed"])
    changed = pico_recipe(tmp_path, "run", "seed_model.train.learning_rate=1e-3")
    other = RunFolder(run.path, changed)
    assert [other.state(stage) for stage in other.graph][:5] == ["done"] * 4 + ["stale"]
    assert other.why_stale(other.graph["seed"]) == "seed_model.train.learning_rate: 0.003 → 0.001"
    old = (run.model("seed") / "model.safetensors").read_bytes()
    again, lines = run_here(changed, ["data", "seed"])
    assert any("data/birds: already done" in line for line in lines)
    assert any("seed: stale (seed_model.train.learning_rate" in line for line in lines)
    assert (again.model("seed") / "model.safetensors").read_bytes() != old
    kept = list((run.path / "stale").glob("*/seed/model/model.safetensors"))
    assert [path.read_bytes() for path in kept] == [old]


def test_settings_that_only_decide_speed_make_nothing_stale(tmp_path: Path) -> None:
    hashes = [
        {stage.name: stage.inputs for stage in build_graph(pico_recipe(tmp_path, "run", *overrides))}
        for overrides in ([], ["train.checkpoint_every=1", "launch.jobs=1", "launch.threads=1"])
    ]
    assert hashes[0] == hashes[1]


def test_a_branch_with_tokens_of_its_own_makes_no_other_branch_stale(tmp_path: Path) -> None:
    plain, more = (
        {stage.name: stage.inputs for stage in build_graph(pico_recipe(tmp_path, "run", *overrides))}
        for overrides in ([], ["train.domain_tokens.birds=4096"])
    )
    assert {name for name in plain if plain[name] != more[name]} == {
        "train/birds", "mix", "baselines/soup", "finetune", "evaluate", "analyze", "report"
    }  # fmt: skip
    planned = plan(pico_recipe(tmp_path, "run", "train.domain_tokens.birds=4096"))
    tokens = {stage["stage"]: stage["tokens"] for stage in planned["stages"]}
    assert (tokens["train/birds"], tokens["train/tools"]) == (4096, 2048)


def test_a_plan_made_for_another_model_is_refused_when_the_model_is_there() -> None:
    found = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
    check_planned({"model_type": "llama", "hidden_size": 64, "unknown_to_the_class": 1}, found)
    with pytest.raises(CheckpointError, match="hidden_size: 32 planned, 64 found"):
        check_planned({"model_type": "llama", "hidden_size": 32}, found)


def test_changed_data_are_noticed(tmp_path: Path) -> None:
    before = build_graph(pico_recipe(tmp_path))["data/birds"].inputs
    with open(tmp_path / "birds.jsonl", "a") as file:
        file.write(json.dumps({"text": "one more bird"}) + "\n")
    assert build_graph(pico_recipe(tmp_path))["data/birds"].inputs != before


def test_a_stage_whose_needs_are_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="train/birds needs data/birds, which is absent"):
        run_here(pico_recipe(tmp_path), ["train/birds"])


def test_a_second_run_in_the_same_folder_is_refused_and_names_the_pid(tmp_path: Path) -> None:
    recipe = write_pico_recipe(tmp_path)
    with exclusive(tmp_path / "runs" / "pico", "run"):
        import os

        second = btx("run", recipe, "data.root=.", cwd=tmp_path)
        assert second.returncode == 2
        assert f"in use by process {os.getpid()}" in second.stderr
    assert not (tmp_path / "runs" / "pico" / "recipe.yaml").exists()


def test_a_folder_that_another_run_has_begun_meanwhile_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pico_recipe(tmp_path)

    def taken_by_another(path: Path, work: str) -> None:
        RunFolder.create(recipe)
        raise NotYet(f"{path}: {work} is in use by process 1")

    monkeypatch.setattr(pipeline, "exclusive", taken_by_another)
    with pytest.raises(NotYet):
        pipeline.run(recipe)
    assert (tmp_path / "run" / "recipe.yaml").exists()


def test_nothing_is_left_when_the_data_are_refused(tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    lines = (tmp_path / "tools.jsonl").read_text().splitlines()
    lines[16] = "{not json"
    (tmp_path / "tools.jsonl").write_text("\n".join(lines))
    code, _, errors = btx_here("run", "pico.yaml", "data.root=.", cwd=tmp_path)
    assert code == 2
    assert "tools.jsonl" in errors
    assert "17" in errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("override", "expected"), [
    ("data.domains.birds=absent.jsonl", "absent.jsonl: no such file"),
    ("seed_model.config.model_type=gpt2", "families: cohere2, ernie4_5"),
])  # fmt: skip
def test_bad_input_exits_with_2_and_leaves_no_folder(tmp_path: Path, override: str, expected: str) -> None:
    write_pico_recipe(tmp_path)
    code, _, errors = btx_here("run", "pico.yaml", "data.root=.", override, cwd=tmp_path)
    assert code == 2, errors
    assert expected in errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_data_are_prepared(tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    code, _, errors = btx_here("run", "pico.yaml", "data.root=.", "device=cuda", cwd=tmp_path)
    assert code == 2, errors
    assert "torch sees no GPU" in errors
    assert not (tmp_path / "runs").exists()
    code, _, errors = btx_here("run", "pico.yaml", "data.root=.", "device=cuda", "--until", "data", cwd=tmp_path)
    assert code == 0, errors  # what needs no GPU is made without one


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    from btx.running.preflight import preflight

    (tmp_path / "nothing").mkdir()
    recipe = pico_recipe(tmp_path, "run", "seed_model={path: " + str(tmp_path / "nothing") + "}")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        preflight(recipe)


def test_an_existing_model_folder_is_branched_without_training_a_seed(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    shutil.copytree(finished[0] / "seed" / "model", tmp_path / "mine")
    recipe = pico_recipe(tmp_path, "run", "seed_model={path: " + str(tmp_path / "mine") + "}")
    run, _ = run_here(recipe, ["data", "seed", "train/birds"])
    assert run.model("seed").resolve() == (tmp_path / "mine").resolve()
    assert (run.model("train/birds") / "tokenizer.json").is_file()
    assert run.done("seed")["flops"] == 0.0


def test_a_changed_task_file_makes_the_evaluation_stale_and_nothing_else(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "run")
    before = {stage.name: stage.inputs for stage in build_graph(recipe)}
    with (tmp_path / "quiz.jsonl").open("a") as quiz:
        quiz.write('{"prompt": "the owl", "answer": "flies"}\n')
    changed = {stage.name for stage in build_graph(recipe) if stage.inputs != before[stage.name]}
    assert changed == {"evaluate", "report"}
