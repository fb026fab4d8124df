"""A disk that is full or can only be read: named, nothing that was whole is harmed, and with room again it goes on bit
for bit."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from btx.errors import RunFolderError
from btx.files import file_sha256
from btx.model_files.direct_file import DirectFile
from btx.process import Interrupts, ending_if_hung
from btx.run_folder.folder import RunFolder
from btx.run_folder.status import run_status
from btx.stages.work import run_stages
from btx.training import background_saving
from btx.training.state import StateFolder
from tests.pico_run import pico_recipe, run_here, stopped_after
from tests.processes import start
from tests.test_training_state import MARKS, saved, trained

NO_MOUNTS = 77
STEPS = 8
CHECKPOINT = 450_000
"""Bytes of a checkpoint of the pico model, a little more."""
LEFT = {"checkpoint": 150_000 + CHECKPOINT, "model": 100_000}
"""What the disk is full in → bytes free when training starts, or has made its last step."""


def mounted(*arguments: str) -> None:
    """Mount something in a namespace of this process alone; ends it if it may not."""
    if subprocess.run(["mount", *arguments], capture_output=True).returncode:
        os._exit(NO_MOUNTS)


def own_mounts() -> None:
    """What this process mounts, no other sees, and it ends with it."""
    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
        os._exit(NO_MOUNTS)
    mounted("--make-rprivate", "/")


def on_a_small_disk(path: str, report: str) -> None:
    """Train a branch on a disk that gets full in its second checkpoint, then in the model, then has room."""
    own_mounts()
    disk = Path(path).with_name("disk")
    disk.mkdir()
    mounted("-t", "tmpfs", "-o", "size=20m", "none", str(disk))
    run = RunFolder.open(Path(shutil.copytree(path, disk / "run")))
    found: dict[str, Any] = {}
    for where, left in LEFT.items():
        ballast = disk / "ballast"
        free = os.statvfs(disk)
        ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - left))
        try:
            run_stages(run, ["train/birds"], Interrupts(), print)
        except RunFolderError as error:
            found[where] = str(error)
        ballast.unlink()
        found[f"{where} leaves"] = sorted(p.name for p in run.folder("train/birds").rglob("*") if p.is_dir())
        if where == "checkpoint":
            stopped_after(run, "train/birds", STEPS - 3)
    lines: list[str] = []
    run_stages(RunFolder.open(run.path), ["train/birds"], Interrupts(), lines.append)
    found["resumed"] = [line for line in lines if line.startswith("resumed")]
    found["sha256"] = file_sha256(run.model("train/birds") / "model.safetensors")
    Path(report).write_text(json.dumps(found))


def on_a_disk_that_can_only_be_read(path: str, report: str) -> None:
    """Look at a run, and try to work in it."""
    own_mounts()
    mounted("--bind", path, path)
    mounted("-o", "remount,bind,ro", path)
    run = RunFolder.open(Path(path))
    found: dict[str, Any] = {row["stage"]: row["state"] for row in run_status(run)}
    try:
        run_stages(run, ["train/birds"], Interrupts(), print)
    except RunFolderError as error:
        found["error"] = str(error)
    Path(report).write_text(json.dumps(found))


@pytest.fixture(scope="module")
def branchable(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with its data and seed model."""
    folder = tmp_path_factory.mktemp("disk")
    return run_here(pico_recipe(folder, "run", "seed_model.train.tokens=512"), ["data", "seed"])[0]


def report_of(target: Any, run: RunFolder, tmp_path: Path) -> dict[str, Any]:
    process = start(target, str(run.path), str(tmp_path / "report"), log=tmp_path / "log")
    process.join()
    if process.exitcode == NO_MOUNTS:
        pytest.skip("nothing can be mounted here: it takes root or CAP_SYS_ADMIN")
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    found: dict[str, Any] = json.loads((tmp_path / "report").read_text())
    return found


@pytest.mark.long
def test_a_disk_that_is_full_in_a_checkpoint_and_then_in_the_model_costs_nothing_that_was_whole(
    branchable: RunFolder, tmp_path: Path
) -> None:
    found = report_of(on_a_small_disk, branchable, tmp_path)
    for where, file in (("checkpoint", "state/step-00000006"), ("model", "train/birds/model")):
        assert f"{file}: cannot be written" in found[where]
        assert "No space left on device" in found[where]
        assert "Free space" in found[where]
    assert found["checkpoint leaves"] == ["state", "step-00000003"]
    assert found["model leaves"] == ["state", "step-00000006", "step-00000008"]
    assert found["resumed"] == ["resumed after step 8 of 8"]
    run_here(branchable.recipe, ["train/birds"])
    assert found["sha256"] == file_sha256(branchable.model("train/birds") / "model.safetensors")


@pytest.mark.long
def test_a_run_on_a_disk_that_can_only_be_read_can_be_looked_at_and_says_why_it_cannot_go_on(
    branchable: RunFolder, tmp_path: Path
) -> None:
    found = report_of(on_a_disk_that_can_only_be_read, branchable, tmp_path)
    assert "cannot be written (Read-only file system)" in found["error"]
    assert found["seed"] == "done"
    assert found["train/tools"] == "absent"


class Slow(DirectFile):
    """A disk that takes a tenth of a second for every piece."""

    def _write(self, data: memoryview) -> None:
        for at in range(0, len(data), 200):
            time.sleep(0.1)
            super()._write(data[at : at + 200])


@pytest.mark.long
def test_writing_to_a_slow_disk_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_saving, "DirectFile", Slow)
    folder = StateFolder(tmp_path / "state", MARKS)
    with ending_if_hung(1.0, pytest.fail):
        for step in (1, 2, 3):
            saved(folder, step, *trained(step))
    assert StateFolder(tmp_path / "state", MARKS).load(*trained(0)) == 3
