"""What users get wrong and what machines do, provoked for real: a clear message, exit code 2, nothing lost."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from btx.errors import DataError, RunFolderError, StageFailed
from btx.files import file_sha256
from btx.metrics_file import last_metrics
from btx.planning.plan import plan
from btx.recipe.loading import load_recipe
from btx.recipe.schema import Recipe
from btx.run_folder.folder import RunFolder
from btx.run_folder.status import run_status
from btx.running.launchers import START, Handle
from btx.running.pipeline import run as run_pipeline
from btx.running.preflight import preflight
from btx.running.progress import Display
from tests.pico_run import pico_recipe, run_here, stopped_after, write_pico_recipe
from tests.processes import ForkedLauncher, btx, quick_jobs, run_with_forked_jobs
from tests.processes import start as start_process


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


# Data: refused by the run's first stage


def cut(lines: list[str]) -> list[str]:
    return lines[:20]


@pytest.mark.parametrize(("change", "overrides", "expected"), [
    (lambda lines: [], [], r"domain 'birds': .*birds\.jsonl: this file holds no document"),
    (lambda lines: [*lines[:16], '{"text": "half a li', *lines[17:]], [], r"birds\.jsonl, line 17: not JSON"),
    (lambda lines: [*lines[:4], '["a list"]'], [], r"birds\.jsonl, line 5: a list, not a JSON object"),
    (lambda lines: [line.replace('"text"', '"body"') for line in lines], [],
     r"birds\.jsonl, line 1: no key 'text'; keys there: 'body'"),
    (cut, ["train.tokens=900000"], r"domain 'birds', source 0: [\d,]+ training tokens, but train\.tokens = 900,000 "
     r"takes 810,000 tokens from it: \d+ epochs, at most 50"),
    (cut, ["data.sequence_length=4096"], r"fewer than one training sequence \(data\.sequence_length \+ 1 = 4,097\)"),
    (lambda lines: lines[:1], [], r"domain 'birds': \d held-out documents with \d+ tokens; needed: at least 1"),
])  # fmt: skip
def test_bad_data_are_refused_before_any_training(
    tmp_path: Path, change: Callable[[list[str]], list[str]], overrides: list[str], expected: str
) -> None:
    write_pico_recipe(tmp_path)
    file = tmp_path / "birds.jsonl"
    file.write_text("".join(line + "\n" for line in change(file.read_text("utf-8").splitlines())), "utf-8")
    with pytest.raises(DataError, match=expected) as caught:
        run_here(pico_recipe(tmp_path, "run", *overrides), ["data", "seed"])
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run" / "data" / "done.json").exists()
    assert not (tmp_path / "run" / "seed").exists()


def test_a_domain_without_readable_files_names_formats_and_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "notes.docx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no readable file; formats: \.jsonl, .*; found: notes\.docx"):
        run_here(pico_recipe(tmp_path, "run", "data.domains.birds=words"), ["data"])


# Seed models


def broken(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(("files", "expected"), [
    ({}, "this folder holds no model: config.json is missing"),
    ({"config_json": "{"}, "not readable as JSON"),
    ({"config_json": "{}"}, "no model_type"),
    ({"config_json": '{"model_type": "llama"}'}, "no weights: there is no .safetensors file"),
    ({"config_json": '{"model_type": "llama"}', "model_bin": "x"}, "only pickled weights"),
    ({"config_json": '{"model_type": "gpt2"}', "model_safetensors": "\x02" + 7 * "\0" + "{}"}, "families: "),
])  # fmt: skip
def test_a_folder_that_is_no_model_is_refused_before_anything_is_written(
    tmp_path: Path, files: dict[str, str], expected: str
) -> None:
    folder = broken(tmp_path / "mine", **files)
    recipe = pico_recipe(tmp_path, "run", f"seed_model={{path: {folder}}}")
    for check in (preflight, plan) if files else (preflight,):
        with pytest.raises(Exception, match=re.escape(expected)) as caught:
            check(recipe)
        assert getattr(caught.value, "exit_code", None) == 2
    assert not (tmp_path / "run").exists()


# Writing


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run whose seed model was stopped between two checkpoints, as by kill -9."""
    recipe = pico_recipe(tmp_path_factory.mktemp("interrupted"), "run", "seed_model.train.tokens=15360")
    run, _ = run_here(recipe, ["data"])
    stopped_after(run, "seed", 4)
    return recipe


def start(*arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "btx", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(run: RunFolder, stage: str, step: int, job: psutil.Process, log: Path) -> None:
    while (last_metrics(run.folder(stage) / "metrics.jsonl") or {"step": 0})["step"] < step:
        assert job.is_running(), log.read_text()
        assert job.status() != psutil.STATUS_ZOMBIE, log.read_text()
        time.sleep(0.005)


def with_small_files(*arguments: str) -> None:
    """A command that cannot write files of more than 60 kB, which fails like a full disk: in the middle of one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    btx(*arguments)


@pytest.mark.long
def test_a_write_that_fails_leaves_the_checkpoint_before_whole(interrupted: Recipe, tmp_path: Path) -> None:
    shutil.copytree(str(interrupted.run), tmp_path / "run")
    state = tmp_path / "run" / "seed" / "state"
    before = hashes(state)
    assert before
    job = start_process(with_small_files, "train", str(tmp_path / "run"), "seed", log=tmp_path / "log")
    job.join()
    printed = (tmp_path / "log").read_text()
    assert job.exitcode == 2, printed
    assert re.search(r"error: .*state/step-\d+: cannot be written \(.*File too large.*\); what was there before is "
                     r"untouched", printed)  # fmt: skip
    assert "Traceback" not in printed
    assert hashes(state) == before
    _, lines = run_here(load_recipe(str(tmp_path / "run")), ["seed"])
    assert any(f"resumed after step {int(max(before)[5:13])} of 60" in line for line in lines), lines


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path)
    run, _ = run_here(recipe, ["data"])
    run.folder("seed").mkdir()
    (run.folder("seed") / "state").write_text("a file where a folder should be")
    with pytest.raises(RunFolderError, match=r"state/step-00000003: cannot be written"):
        run_here(recipe, ["seed"])
    assert not (run.folder("seed") / "done.json").exists()


def test_a_run_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    write_pico_recipe(tmp_path)
    done = start("run", "pico.yaml", "data.root=.", "run=quiz.jsonl/run", cwd=tmp_path)
    _, errors = done.communicate()
    assert done.returncode == 2, errors
    assert "quiz.jsonl" in errors
    assert "Traceback" not in errors


# Signals


@pytest.mark.parametrize("whole_group", [pytest.param(False, marks=pytest.mark.long), True])
def test_sigterm_to_a_run_lets_its_jobs_save_and_ends_them(tmp_path: Path, whole_group: bool) -> None:
    """Once to the processes that users start, once to the same code in forked ones."""
    long, log = "seed_model.train.tokens=400000", tmp_path / "log"
    run, _ = run_here(pico_recipe(tmp_path, "runs/pico", long), ["data"])
    arguments = (str(tmp_path / "pico.yaml"), f"data.root={tmp_path}", f"run={run.path}", long)
    if whole_group:
        forked = start_process(run_with_forked_jobs, *arguments, log=log)
        running = psutil.Process(forked.pid)
    else:
        with log.open("w") as file:
            real = subprocess.Popen([sys.executable, "-m", "btx", "run", *arguments], stdout=file, stderr=file)
        running = psutil.Process(real.pid)
    wait_for_step(run, "seed", 3, running, log)
    jobs = running.children()
    assert jobs
    for process in [*jobs, running] if whole_group else [running]:  # scancel, systemctl stop: every process gets it
        process.send_signal(signal.SIGTERM)
    if whole_group:
        forked.join()
    code = forked.exitcode if whole_group else real.wait()
    assert code == 128 + signal.SIGTERM
    assert "continues" in log.read_text()
    assert not [job for job in jobs if job.is_running() and job.status() != psutil.STATUS_ZOMBIE]
    assert list((run.folder("seed") / "state").glob("step-*"))
    assert run.state(run.graph["seed"]) == "begun"


def test_a_second_run_leaves_the_first_ones_files_alone(tmp_path: Path) -> None:
    from btx.run_folder.folder import exclusive

    run, _ = run_here(pico_recipe(tmp_path), ["data"])
    before = hashes(run.path)
    with exclusive(run.path, "run"):
        second = start("run", tmp_path / "pico.yaml", f"data.root={tmp_path}", f"run={run.path}", "train.replay=0.5")
        _, errors = second.communicate()
    assert second.returncode == 2
    assert re.search(rf"run is in use by process {os.getpid()} ", errors)
    after = hashes(run.path)
    assert {path: after[path] for path in before} == before
    assert json.loads((run.path / "data" / "birds" / "done.json").read_text("utf-8"))


def test_a_failed_run_names_the_stage_its_log_and_how_to_go_on(tmp_path: Path) -> None:
    hot = ["seed_model.train.learning_rate=1e30", "seed_model.train.warmup_steps=0"]
    recipe = pico_recipe(tmp_path, "run", *hot)
    run_here(recipe, ["data"])
    expected = (r"(?s)seed failed \(exit code 1\); its log is .*seed\.log:\n"
                r"step \d+: the loss is .* Last good checkpoint: .*continues")  # fmt: skip
    with pytest.raises(StageFailed, match=expected) as caught, quick_jobs():
        run_pipeline(recipe)
    assert caught.value.exit_code == 1


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Said(Display):
    """What a run said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_a_run_names_all_that_failed_and_status_has_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = pico_recipe(tmp_path, "run", "launch.jobs=2")
    run, _ = run_here(recipe, ["data", "seed"])

    class KilledLauncher(ForkedLauncher):
        def forked(self, run: Path, stages: Sequence[str], log: Path) -> BaseProcess:
            return start_process(killed, log=log)

    monkeypatch.setitem(START, "local", KilledLauncher)
    said = Said()
    with pytest.raises(StageFailed, match=r"micro_batch_tokens") as caught:
        run_pipeline(recipe, display=said)
    for stage in ("train/birds", "train/tools"):  # whichever ended first
        assert f"{stage} failed (signal 9)" in str(caught.value)
    assert re.match(r"failed: train/(birds, train/tools|tools, train/birds); not begun: mix, baselines/soup, finetune",
                    said.lines[-1])  # fmt: skip
    for row in run_status(run):
        assert (row["state"] == "failed") == row["stage"].startswith("train/"), row
        assert row["state"] != "failed" or "killed from outside" in row["why"]


class EditingLauncher(ForkedLauncher):
    """Somebody edits the run folder's recipe just before its first job starts."""

    def submit(self, run: Path, stages: Sequence[str], log: Path, *, after: Sequence[Handle] = ()) -> Handle:
        recipe = run / "recipe.yaml"
        recipe.write_text(recipe.read_text("utf-8").replace("vocab_size: 320", "vocab_size: 300"), "utf-8")
        return super().submit(run, stages, log, after=after)


def test_a_recipe_edited_under_a_running_run_ends_it_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pico_recipe(tmp_path, "run", "launch.jobs=1")
    run, _ = run_here(recipe, ["data/tokenizer"])
    shutil.rmtree(run.path / "data")
    monkeypatch.setitem(START, "local", EditingLauncher)
    expected = r"data/birds cannot start: data/tokenizer is stale \(seed_model\.tokenizer\.vocab_size: 300 → 320\)"
    with pytest.raises(RunFolderError, match=expected):
        run_pipeline(recipe)
    assert not (run.path / "data" / "birds").exists()
