"""Branches are independent and everything resumes exactly (paper, section 3.1; the project's first promise)."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from btx.errors import NotFinite
from btx.files import file_sha256
from btx.metrics_file import last_metrics
from btx.process import Interrupted, Interrupts
from btx.run_folder.folder import RunFolder
from btx.stages.work import run_stages
from tests.pico_run import pico_recipe, run_here, stopped_after
from tests.processes import btx, start, start_btx


def files_of(run: RunFolder) -> dict[str, str]:
    return {str(path.relative_to(run.path)): file_sha256(path) for path in run.path.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def branched(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with data and seed model, ready for its branches."""
    return run_here(pico_recipe(tmp_path_factory.mktemp("branched")), ["data", "seed"])[0]


def test_expert_processes_share_no_files(branched: RunFolder) -> None:
    before = files_of(branched)
    run_here(branched.recipe, ["train/birds"])
    after = files_of(branched)
    changed = {path for path in after if after[path] != before.get(path)} - {"manifest.json"}
    assert changed
    assert all(path.startswith(("train/birds/", ".locks/train-birds")) for path in changed), changed


def test_a_branch_starts_from_the_seed_model_and_moves(branched: RunFolder) -> None:
    run_here(branched.recipe, ["train/tools"])
    seed = load_file(branched.model("seed") / "model.safetensors")
    expert = load_file(branched.model("train/tools") / "model.safetensors")
    assert seed.keys() == expert.keys()
    assert all((seed[name] - expert[name]).abs().max() > 0 for name in seed)


def test_a_feed_forward_branch_leaves_shared_weights_bit_for_bit(tmp_path: Path) -> None:
    run, _ = run_here(pico_recipe(tmp_path, "run", "train.trainable=feed_forward"), ["data", "seed", "train/birds"])
    seed = load_file(run.model("seed") / "model.safetensors")
    expert = load_file(run.model("train/birds") / "model.safetensors")
    for name in seed:
        assert seed[name].equal(expert[name]) == (".mlp." not in name), name


def kill_while_training(run: RunFolder, stage: str, at_step: int, saved: int = 0) -> None:
    """Start a stage in its own process and kill -9 it once it has done `at_step` steps and has `saved` checkpoints."""
    log, folder = run.path.with_suffix(".log"), run.folder(stage)
    process = start_btx("work", run.path, stage, log=log)
    deadline = time.monotonic() + 60
    while (last_metrics(folder / "metrics.jsonl") or {"step": 0})["step"] < at_step or (
        len(list(folder.glob("state/step-*"))) < saved
    ):
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()


def test_a_resumed_run_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the number of threads decides the last bits
    needs = ["data", "seed", "train/birds", "train/tools", "mix"]
    whole, _ = run_here(pico_recipe(tmp_path, "whole"), [*needs, "finetune"])
    killed, _ = run_here(pico_recipe(tmp_path, "killed"), needs[:2])
    stopped_after(killed, "train/birds", 5)
    run_here(killed.recipe, needs)
    kill_while_training(killed, "finetune", 2)
    kill_while_training(killed, "finetune", 5, saved=1)
    assert not (killed.folder("finetune") / "done.json").exists()
    _, lines = run_here(killed.recipe, ["finetune"])
    assert any("resumed after step" in line for line in lines), lines
    for stage in ("train/birds", "finetune"):
        one, two = (load_file(run.model(stage) / "model.safetensors") for run in (whole, killed))
        assert one.keys() == two.keys()
        assert all(one[name].equal(two[name]) for name in one)
        losses = [
            [json.loads(line)["loss"] for line in (run.folder(stage) / "metrics.jsonl").read_text("utf-8").splitlines()]
            for run in (whole, killed)
        ]
        assert losses[0] == losses[1]


def test_sigterm_saves_and_the_next_call_continues(tmp_path: Path) -> None:
    overrides = ["seed_model.train.tokens=256000", "seed_model.train.checkpoint_every=10000"]
    run, _ = run_here(pico_recipe(tmp_path, "run", *overrides), ["data"])

    def end_it() -> None:
        while (last_metrics(run.folder("seed") / "metrics.jsonl") or {"step": 0})["step"] < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watching, interrupts = threading.Thread(target=end_it), Interrupts().listen()
    watching.start()
    try:
        with pytest.raises(Interrupted, match="run it again to continue") as stopped:
            run_stages(run, ["seed"], interrupts, lambda line: None)
    finally:
        interrupts.unlisten()
        watching.join()
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert len(list((run.folder("seed") / "state").glob("step-*"))) == 1


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path)
    run, _ = run_here(recipe, ["data"])
    stopped_after(run, "seed", 6)
    checkpoints = sorted((run.folder("seed") / "state").glob("step-*"))
    assert [path.name for path in checkpoints] == ["step-00000003", "step-00000006"]
    weights = checkpoints[-1] / "weights.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    _, lines = run_here(recipe, ["seed"])
    assert any("resumed after step 3 of 10" in line for line in lines), lines


def test_a_loss_that_is_not_finite_stops_and_names_step_and_checkpoint(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "run", "seed_model.train.learning_rate=1e30", "seed_model.train.warmup_steps=0",
                         "seed_model.train.checkpoint_every=1")  # fmt: skip
    run_here(recipe, ["data"])
    with pytest.raises(NotFinite, match=r"step \d+: the loss is .* Last good checkpoint: .*step-"):
        run_here(recipe, ["seed"])


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from btx.errors import RunFolderError
    from btx.model_files.direct_file import DirectFile
    from btx.training import background_saving

    recipe = pico_recipe(tmp_path)
    run, _ = run_here(recipe, ["data"])
    opened: list[Path] = []

    class Full(DirectFile):
        """The disk is full in the second checkpoint's optimiser state."""

        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

        def _write(self, data: memoryview) -> None:
            if len(opened) > 3:
                raise OSError(28, "No space left on device")
            super()._write(data)

    monkeypatch.setattr(background_saving, "DirectFile", Full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        run_here(recipe, ["seed"])
    state = run.folder("seed") / "state"
    assert [path.name for path in state.iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    _, lines = run_here(recipe, ["seed"])
    assert any("resumed after step 3" in line for line in lines)


def job_of_its_own(run: str) -> None:
    """Start the seed model's job in another session, as a launcher does, say its process number and wait."""
    job = os.fork()
    if not job:
        os.setsid()
        btx("work", run, "seed")
    print(job, flush=True)
    os.waitpid(job, 0)


def test_jobs_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    import psutil

    run, _ = run_here(pico_recipe(tmp_path, "run", "seed_model.train.tokens=400000"), ["data"])
    parent = start(job_of_its_own, str(run.path), log=tmp_path / "log")
    while (last_metrics(run.folder("seed") / "metrics.jsonl") or {"step": 0})["step"] < 2:
        assert parent.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.05)
    job = int((tmp_path / "log").read_text().split()[0])
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(job) and psutil.Process(job).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (run.folder("seed") / "done.json").exists()
    assert list((run.folder("seed") / "state").glob("step-*"))
