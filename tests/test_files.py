"""Folders and files that are complete or absent: who may remove what, and what a writer does when its place is gone."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from pathlib import Path

import pytest

from btx.errors import RunFolderError
from btx.files import atomic_folder, read_json, remove_left_overs, write_json, write_text
from tests.processes import start


def write_and_wait(target: str, started: str, go: str) -> None:
    """Write a folder in a process of its own; the file `go` lets it end."""
    with atomic_folder(Path(target)) as beside:
        (beside / "content").write_text("whole")
        Path(started).touch()
        while not Path(go).exists():
            time.sleep(0.01)


@pytest.mark.parametrize("other", ["moe", "moe.v2"])
def test_what_a_living_process_writes_beside_is_left_alone(tmp_path: Path, other: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    started, go = tmp_path / "started", tmp_path / "go"
    writer = start(write_and_wait, str(work / other), str(started), str(go), log=tmp_path / "log")
    while not started.exists():
        assert writer.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.01)
    with atomic_folder(work / "moe") as beside:
        (beside / "content").write_text("other")
    go.touch()
    writer.join()
    if other == "moe":  # the same output twice: the first to end has it, the second is told so
        assert writer.exitcode == 1
        assert "another process has written it meanwhile" in (tmp_path / "log").read_text()
        assert sorted(path.name for path in work.iterdir()) == ["moe"]
    else:
        assert writer.exitcode == 0, (tmp_path / "log").read_text()
        assert (work / other / "content").read_text() == "whole"
    assert (work / "moe" / "content").read_text() == "other"


def test_left_overs_of_the_same_name_alone_are_removed(tmp_path: Path) -> None:
    others = [".moe.v2.0123abcd.tmp", ".moe.0123abcd.tmp.tmp", ".moe.not.tmp", ".amoe.0123abcd.tmp", "moe.0123abcd.tmp"]
    for name in (".moe.0123abcd.tmp", *others):
        (tmp_path / name / "inside").mkdir(parents=True)
    with atomic_folder(tmp_path / "moe"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["moe", *others])
    old, young = tmp_path / ".a.json.0123abcd.tmp", tmp_path / ".a.json.00000000.tmp"
    for file, age_s in ((old, 4000), (young, 10)):
        file.touch()
        os.utime(file, (time.time() - age_s,) * 2)
    write_json(tmp_path / "a.json", 1)
    assert not old.exists()
    assert young.exists()
    for file in (young, tmp_path / "a.json"):
        file.unlink()
    (tmp_path / ".step-12.0123abcd.tmp").mkdir()
    remove_left_overs(tmp_path, r"step-\d+")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["moe", *others])


@pytest.mark.parametrize("recreated", [False, True])
def test_a_writer_whose_folder_is_gone_fails(tmp_path: Path, recreated: bool) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "moe") as beside:
            shutil.rmtree(beside)
            if recreated:
                beside.mkdir()

    with pytest.raises(RunFolderError, match="moe: somebody removed"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_written_into_a_folder_that_is_gone(tmp_path: Path) -> None:
    for folder in (".moe.0123abcd.tmp", ".moe.0123abcd.tmp/inside", ".mix.making", ".math.adopting"):
        with pytest.raises(RunFolderError, match=rf"somebody has removed .*{folder}.* meanwhile"):
            write_text(tmp_path / folder / "a.txt", "a")
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "new" / "folder.tmp" / "a.json", 1)
    assert read_json(tmp_path / "new" / "folder.tmp" / "a.json") == 1


def test_an_error_inside_leaves_nothing_and_the_old_folder_whole(tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "old").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "moe") as beside:
        (beside / str(1 // 0)).touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["moe", "moe/old"]


def test_whoever_is_killed_while_one_folder_takes_anothers_place_leaves_one_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def killed_after(path: Path, target: Path) -> Path:
        rename(path, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed_after)
    (tmp_path / "moe").mkdir()
    with contextlib.suppress(KeyboardInterrupt), atomic_folder(tmp_path / "moe") as beside:
        (beside / "new").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["moe", "moe/new"]


@pytest.mark.parametrize(("number", "fails"), [(errno.EIO, True), (errno.EINVAL, False)])
def test_a_folder_that_cannot_be_synced_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails: bool
) -> None:
    def on_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", on_folders)

    def write_both() -> None:
        write_json(tmp_path / "a.json", 1)
        with atomic_folder(tmp_path / "moe"):
            pass

    with pytest.raises(RunFolderError, match="may not outlast") if fails else contextlib.nullcontext():
        write_both()
    assert read_json(tmp_path / "a.json") == 1
    assert (tmp_path / "moe").exists() != fails


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_that_replaces_another_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:
        monkeypatch.setattr("btx.files._exchange", lambda beside, target: False)
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "moe") as beside:
            (beside / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["moe", "moe/new"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btx.files._exchange", lambda beside, target: False)
    rename = Path.rename

    def on_a_full_disk(path: Path, target: Path) -> Path:
        if target.name == "moe" and (path / "new").exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(path), None, str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", on_a_full_disk)
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "old").touch()
    with (
        pytest.raises(RunFolderError, match="what was there before is untouched"),
        atomic_folder(tmp_path / "moe") as beside,
    ):
        (beside / "new").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["moe", "moe/old"]


def test_an_input_that_fails_is_named_and_not_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="in/gone"), atomic_folder(tmp_path / "out" / "moe"):
        (tmp_path / "in" / "gone").read_text()
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"file/a/moe: cannot be written \(Not a directory\)"):
        write_json(tmp_path / "file" / "a" / "moe", 1)
