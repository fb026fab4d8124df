"""Checkpoints that are written while training goes on: what is in them, and what a failure or a kill leaves."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from btx.errors import RunFolderError
from btx.files import file_sha256, read_json
from btx.model_files.direct_file import DirectFile
from btx.models.free_memory import free_memory
from btx.models.loading import load_model
from btx.planning.speed import RandomSamples
from btx.process import Interrupted, Interrupts
from btx.recipe.training import Training
from btx.training import background_saving, state
from btx.training.background_saving import BackgroundWriter, HostCopy, file_of, tensor_bytes
from btx.training.job import TrainingJob
from btx.training.loop import run_training
from btx.training.state import StateFolder
from tests.pico_run import StopAfter
from tests.processes import start
from tests.test_training_state import MARKS, trained

STEPS = 6


class HeldFile(DirectFile):
    """Writes nothing before it may; notes how many files are open at once."""

    may_write: threading.Event
    error: OSError | None = None

    def _write(self, data: memoryview) -> None:
        assert self.may_write.wait(20)
        if HeldFile.error is not None:
            raise HeldFile.error
        super()._write(data)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set no checkpoint gets on."""
    HeldFile.may_write, HeldFile.error = threading.Event(), None
    monkeypatch.setattr(background_saving, "DirectFile", HeldFile)
    yield HeldFile.may_write
    HeldFile.may_write.set()


def check_for_ever(folder: StateFolder) -> None:
    """As training does, step after step."""
    while True:
        folder.check()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def job(seed: Path, folder: Path) -> TrainingJob:
    """A training of six steps that saves after every one."""
    settings = Training(tokens=STEPS * 32, batch_tokens=32, micro_batch_tokens=16, learning_rate=1e-2, warmup_steps=2,
                        checkpoint_every=1)  # fmt: skip
    return TrainingJob(
        model=load_model(seed), mixture=RandomSamples(320, sequence_length=16), settings=settings, folder=folder,
        checkpoints=StateFolder(folder / "state", MARKS), flops_per_token=1.0, rng_seed=0,
    )  # fmt: skip


def final_state(folder: Path) -> dict[str, Tensor]:
    last = max(folder.glob("state/step-*"))
    assert last.name == f"step-{STEPS:08d}"
    return load_file(last / "weights.safetensors") | load_file(last / "optimizer.safetensors")


def test_what_training_changes_while_a_checkpoint_is_written_is_not_in_it(
    tmp_path: Path, held: threading.Event
) -> None:
    (model, optimizer), folder = trained(3), StateFolder(tmp_path / "state", MARKS)
    folder.save(3, model, optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
            for moment in optimizer.state[parameter].values():
                moment.fill_(7.0)
    assert names(tmp_path / "state") == []
    held.set()
    folder.close()
    fresh, its_optimizer = trained(0)
    expected, expected_optimizer = trained(3)
    assert StateFolder(tmp_path / "state", MARKS).load(fresh, its_optimizer) == 3
    for was, restored in zip(expected.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(was, restored)
        kept, found = expected_optimizer.state[was], its_optimizer.state[restored]
        assert all(torch.equal(kept[moment], found[moment]) for moment in kept)


def test_the_metrics_of_a_checkpoint_are_those_of_the_moment_of_saving(tmp_path: Path, held: threading.Event) -> None:
    lines, folder = tmp_path / "metrics.jsonl", StateFolder(tmp_path / "state", MARKS)
    lines.write_text('{"step": 1}\n')
    whole = {"bytes": lines.stat().st_size, "sha256": file_sha256(lines)}
    folder.save(1, *trained(1))
    lines.write_text('{"step": 1}\n{"step": 2}\n')
    held.set()
    folder.close()
    assert read_json(tmp_path / "state" / "step-00000001" / "state.json")["metrics"] == whole


def test_a_second_save_waits_for_the_first_and_says_so_once(
    tmp_path: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "LONG_WAIT_S", 0.01)
    told: list[str] = []
    folder, parts = StateFolder(tmp_path / "state", MARKS, log=told.append), trained(1)
    folder.save(1, *parts)
    for step in (2, 3, 4):
        held.clear()
        threading.Timer(0.03, held.set).start()
        folder.save(step, *parts)
        assert f"step-{step - 1:08d}" in names(tmp_path / "state")
    folder.close()
    assert names(tmp_path / "state") == ["step-00000003", "step-00000004"]
    assert [line.startswith("training waited 0 s for the checkpoint before") for line in told] == [True]


def test_without_room_for_a_copy_training_waits_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_saving, "free_memory", lambda: 100)
    told: list[str] = []
    folder = StateFolder(tmp_path / "state", MARKS, log=told.append)
    for step in (1, 2):
        folder.save(step, *trained(step))
        assert f"step-{step:08d}" in names(tmp_path / "state")
    assert len(told) == 1
    assert "memory has no room for a copy" in told[0]
    fresh, optimizer = trained(0)
    assert folder.load(fresh, optimizer) == 2
    assert torch.equal(fresh.weight, trained(2)[0].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_save_that_fails_is_told_at_the_next_step_and_leaves_the_checkpoint_before(
    tmp_path: Path, held: threading.Event, number: int
) -> None:
    folder, parts = StateFolder(tmp_path / "state", MARKS), trained(1)
    held.set()
    folder.save(1, *parts)
    folder.close()
    held.clear()
    HeldFile.error = OSError(number, os.strerror(number))
    folder.save(2, *parts)
    folder.check()  # nothing has failed yet
    held.set()
    expected = f"step-00000002: cannot be written .{os.strerror(number)}.*is untouched"
    with pytest.raises(RunFolderError, match=expected):
        check_for_ever(folder)
    folder.close()  # told once
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000001"]
    HeldFile.error = None
    folder.save(3, *parts)
    assert folder.last() == str(tmp_path / "state" / "step-00000003")


def test_a_training_that_ends_by_an_error_ends_after_its_checkpoint_is_written(
    make_llama: Callable[..., Path], tmp_path: Path, held: threading.Event
) -> None:
    threading.Timer(0.05, held.set).start()
    with pytest.raises(Interrupted):
        run_training(job(make_llama("seed"), tmp_path), StopAfter(1), print)
    assert names(tmp_path / "state") == ["step-00000001"]
    assert not list((tmp_path / "state").glob(".*"))


def test_an_error_of_the_program_in_the_thread_is_not_lost() -> None:
    writer = BackgroundWriter()
    writer.start(lambda: [][0])
    with pytest.raises(IndexError):
        writer.wait()


KILLED_AT = (1, 3, 8)
"""How many files of checkpoints, or renames to them, the killed process had begun."""


def killed_in(seed: str, folder: str, at: int) -> None:
    """Train, and be killed at the `at`-th file of a checkpoint, or rename to one, that this process begins."""
    begun = 0

    def begin() -> None:
        nonlocal begun
        begun += 1
        if begun == at:
            os.kill(os.getpid(), signal.SIGKILL)

    class Killing(DirectFile):
        def _write(self, data: memoryview) -> None:
            super()._write(data[: len(data) // 2])
            begin()
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            super()._write(data)

    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        begin()
        return rename(path, target)

    background_saving.DirectFile = Killing  # type: ignore[misc]
    Path.rename = renamed  # type: ignore[method-assign,assignment]
    torch.set_num_threads(1)
    run_training(job(Path(seed), Path(folder)), Interrupts(), print)


def test_a_training_killed_in_the_middle_of_its_checkpoints_ends_bit_for_bit_as_one_that_was_not(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    seed, whole, killed = make_llama("seed"), tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run_training(job(seed, whole), Interrupts(), print)
    done: list[int] = []
    for at in KILLED_AT:
        process = start(killed_in, str(seed), str(killed), at, log=tmp_path / "log")
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        done.append(max((int(name[-8:]) for name in names(killed / "state")), default=0))
    run_training(job(seed, killed), Interrupts(), print)
    torch.set_num_threads(before)
    assert done == [0, 0, 2]  # two files and a rename are a checkpoint
    expected, found = final_state(whole), final_state(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not list((killed / "state").glob(".*"))


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "odd": torch.randint(0, 255, (37,), dtype=torch.uint8), "half": torch.randn(5, 7).to(torch.bfloat16),
        "turned": torch.randn(6, 4).T, "scalar": torch.tensor(3.0), "none": torch.empty(0, 4),
        "long": torch.arange(9), "parameter": nn.Parameter(torch.randn(11)), "flag": torch.tensor([True, False]),
    }  # fmt: skip


def test_a_file_holds_what_was_copied_whatever_its_type_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_saving, "BLOCK_BYTES", 64)
    tensors, copy = some_tensors(), HostCopy()
    copy.take(tensors.values())
    places = [block.data_ptr() for block in copy.pieces()]
    assert len(places) > 3
    file = tmp_path / "a.safetensors"
    assert file_of(tensors, copy)(file) == file_sha256(file)
    assert [block.data_ptr() for block in copy.pieces()] == places  # the same memory again
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == tensors[name].dtype and found[name].equal(tensors[name]) for name in tensors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_copies_before_what_it_is_told_next(tmp_path: Path) -> None:
    tensors = {name: tensor.cuda() for name, tensor in some_tensors().items()} | {"large": torch.ones(2**26).cuda()}
    copy = HostCopy()
    copy.take(tensors.values())
    for tensor in tensors.values():
        tensor.detach().zero_()
    expected = torch.cat([tensor_bytes(tensor) for tensor in (*some_tensors().values(), torch.ones(2**26))])
    pieces = list(copy.pieces())
    assert all(piece.is_pinned() for piece in pieces)
    assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.parametrize(("controllers", "limit", "usage"), [
    ("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
])  # fmt: skip
def test_the_memory_of_a_container_counts_as_the_machines(
    tmp_path: Path, controllers: str, limit: str, usage: str
) -> None:
    (tmp_path / "cgroup").write_text(f"7:cpu:/elsewhere\n1:{controllers}:/batch/job_1\n")
    batch = tmp_path / "groups" / controllers / "batch"
    assert free_memory(tmp_path, tmp_path / "groups") > 10_000  # no such group: the machine's
    for group, most in ((batch, "10000"), (batch / "job_1", "max")):
        group.mkdir(parents=True)
        for name, content in ((limit, most), (usage, "4000"), ("memory.stat", "anon 2000\ninactive_file 1500\n")):
            (group / name).write_text(content)
    assert free_memory(tmp_path, tmp_path / "groups") == 10_000 - 4_000 + 1_500
