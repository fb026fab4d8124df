"""What the machine refuses is told as that: memory, disks, open files, packages, and never as a broken input."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from btx.errors import BtxError, OutOfMemory, RunFolderError, SystemFailed, UserError
from btx.files import atomic_folder, write_text
from btx.model_files.model_folder import check_model_folder
from btx.run_folder.folder import RunFolder
from btx.system_errors import blame, is_out_of_memory, told
from btx.training import step
from btx.training.metrics import Metrics
from tests.pico_run import pico_recipe, run_here

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"),
]  # fmt: skip


def os_error(number: int, file: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), *([file] if file else []))


@pytest.mark.parametrize("error", NO_MEMORY)
def test_memory_that_is_used_up_is_known_in_every_librarys_words(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(OutOfMemory, match="micro_batch_tokens") as caught:
        blame(error)
    assert caught.value.exit_code == 1


def test_it_is_known_when_it_happens_and_other_errors_are_none() -> None:
    for allocate in (lambda: np.empty(1 << 56), lambda: torch.empty(1 << 56)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(os_error(errno.ENOENT, "a"))


@pytest.mark.parametrize(("error", "kind", "said"), [
    (os_error(errno.EMFILE, "/in/shard.safetensors"), SystemFailed, r"too many open files \(this process may have \d+"),
    (os_error(errno.ENOSPC, "/there/a.json"), RunFolderError, "/there/a.json: cannot be written"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), RunFolderError,
     "cannot be written"),
    (os_error(errno.ENOSPC, f"{tempfile.gettempdir()}/a"), RunFolderError, "TMPDIR"),
    (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/t']"), RunFolderError, "TMPDIR"),
    (ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval.tasks"), UserError, r"branchtrainmix\[eval\]"),
    (ModuleNotFoundError("No module named 'zstandard'", name="zstandard"), UserError, r"branchtrainmix\[data\]"),
    (ModuleNotFoundError("No module named 'peft'", name="peft"), UserError, "pip install 'peft'"),
    (ModuleNotFoundError("No module named 'sklearn'", name="sklearn.svm"), UserError, "scikit-learn"),
    (UserError("as it is"), UserError, "^as it is$"),
])  # fmt: skip
def test_a_failure_of_the_machine_is_not_put_down_to_an_input(
    error: Exception, kind: type[BtxError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        blame(error)


@pytest.mark.parametrize(("error", "said"), [
    (os_error(errno.ENOENT, "/in/a.jsonl"), "/in/a.jsonl: cannot be used (No such file or directory)"),
    (os_error(errno.EIO), "the system refused to read or write: Input/output error"),
])  # fmt: skip
def test_any_other_error_of_the_system_names_its_file(error: OSError, said: str) -> None:
    blame(error)  # whoever knows more says more
    assert str(told(error)) == said


def test_a_fault_of_the_program_is_none_of_these() -> None:
    assert told(KeyError("x")) is None
    assert told(RuntimeError("x")) is None


@pytest.mark.parametrize("error", [
    os_error(errno.ENOENT, "/in/a.jsonl"), os_error(errno.EMFILE), BrokenPipeError(errno.EPIPE, "Broken pipe"),
    os_error(errno.EIO), os_error(errno.ENOSPC, f"{tempfile.gettempdir()}/in/the/way"), ValueError("x"),
])  # fmt: skip
def test_an_error_inside_a_folder_being_written_is_not_told_as_about_writing_it(
    tmp_path: Path, error: Exception
) -> None:
    with pytest.raises(type(error)) as caught, atomic_folder(tmp_path / "model"):
        raise error
    assert caught.value is error
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("btx.system_errors._temporary", lambda: "/")  # another disk, and not full
    for error in (os_error(errno.ENOSPC), Exception("No space left on device (os error 28)")):
        with (
            pytest.raises(RunFolderError, match=r"/model: cannot be written .*No space left"),
            atomic_folder(tmp_path / "model"),
        ):
            raise error
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match=r"file/a\.json: cannot be written \("):
        write_text(tmp_path / "file" / "a.json", "{}")


def test_too_many_open_files_is_not_a_broken_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")

    def refuse(*arguments: Any, **named: Any) -> str:
        raise os_error(errno.EMFILE, str(tmp_path / "config.json"))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SystemFailed, match="too many open files"):
        check_model_folder(tmp_path)


def test_a_full_disk_is_told_with_the_file_that_was_being_appended_to(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    with open("/dev/full", "w", encoding="utf-8") as full, contextlib.suppress(OSError):
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
            metrics.write(full, {"step": 1, "loss": 1.0}, 1, 1.0)
        full.close()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_here(pico_recipe(tmp_path_factory.mktemp("run")), ["data"])[0]


@pytest.mark.parametrize("error", NO_MEMORY[:3])
def test_a_training_without_memory_says_what_saves_some(
    prepared: RunFolder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def no_memory(*arguments: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(step, "next_token_loss", no_memory)
    # Activations: 4 bytes x 34 x 128 tokens x 2 layers x 32; with gradient checkpointing 2 instead of 34.
    with pytest.raises(OutOfMemory, match=r"activations about 1\.1 MB: micro_batch_tokens: 64 \(now 128\) saves about "
                       r"0\.6 MB; gradient_checkpointing: true saves about 1\.0 MB; .*launch\.jobs"):  # fmt: skip
        run_here(prepared.recipe, ["seed"])
