"""Stages whose model several processes train: this process starts them by torch's elastic launcher, what `torchrun` is
made of (https://docs.pytorch.org/docs/stable/elastic/run.html), passes signals on to them and tells how they ended.

Each of them does `btx work` for this stage; it knows its place from its environment, as under a user's own torchrun.
All print where this process prints. One that fails ends the others. A signal, to any of them, lets all save after the
same step; each hands back that it was stopped, so the launcher, which would kill the others 30 seconds after the first
one failed, sees none fail.

On several machines `btx work` runs once on each, and they meet where `btx.training.meeting` says.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import context, reduction
from pathlib import Path
from typing import Any, NamedTuple

from btx import errors
from btx.errors import BtxError, StageFailed, UserError
from btx.outputs import check_outputs
from btx.process import SAVE_AND_END, Interrupted, Interrupts, Log, at_standstill, end_with_parent, quick_imports
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.run_folder.status import failure_of, forget_failure, note_failure
from btx.system_errors import told
from btx.training.meeting import meeting

PRELOADED = ["torch.distributed.fsdp", "transformers.modeling_utils", "transformers.generation.utils"]
"""What takes seconds to import: on a CPU once for all processes of a machine, which are forked from one that has."""
RunStages = Callable[[RunFolder, Sequence[str], Interrupts, Log], None]
"""`btx.stages.work.run_stages`."""
OFTEN_S = 0.1
KILLED = "killed from outside; so the system ends what takes too much memory"
MEETS = str(Path("/torch/distributed/"))
"""Part of the paths of the modules by which processes wait for each other."""
BTX = str(Path(errors.__file__).parent) + os.sep


def is_shared(run: RunFolder, stage: Stage) -> bool:
    """Whether several processes train the model of a stage."""
    return trains_here(run, stage) and run.recipe.launch.processes_of(stage.name) > 1


def trains_here(run: RunFolder, stage: Stage) -> bool:
    """Whether a stage runs the training loop: an existing seed model is only linked."""
    return stage.trains and (stage.name != "seed" or run.recipe.seed_model.path is None)


def train_in_processes(run: RunFolder, stage: Stage, interrupts: Interrupts, log: Log, run_stages: RunStages) -> None:
    """Do a stage in as many processes as the recipe says, this machine's share of them.

    Args:
        run_stages: what each of them does; a function of a module.

    Raises:
        UserError: a stage it needs is not finished, there are fewer GPUs than processes, or what one of the processes
            found.
        StageFailed: a process was killed or failed.
        Interrupted: a signal came; all have saved.
    """
    if run.state(stage) == "done":
        check_outputs(run.folder(stage.name))
        log(f"{stage.name}: already done, skipped")
        return
    run.check_needs(stage)
    count, nodes = run.recipe.launch.processes_of(stage.name), run.recipe.launch.nodes_of(stage.name)
    where = meeting(stage.name, nodes)
    with quick_imports():
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        from btx.models.device import choose_device
    device = choose_device(run.recipe.device).type
    _check_gpus(stage.name, count // nodes, device)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    output, reports = _Output(), Path(tempfile.mkdtemp(prefix="btx-processes-"))
    config = LaunchConfig(
        min_nodes=nodes, max_nodes=nodes, nproc_per_node=count // nodes, max_restarts=0, run_id=where.name,
        rdzv_backend="c10d", rdzv_endpoint=where.endpoint, rdzv_configs=where.options, local_addr=where.own_address,
        # A process that was forked cannot use CUDA if its parent has asked for it.
        start_method="spawn" if device == "cuda" else "forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(reports)),
        signals_to_handle="SIGQUIT",  # the others are `interrupts`'
    )  # fmt: skip
    spread = f", {count // nodes} on each of {nodes} machines" if nodes > 1 else ""
    log(f"{stage.name}: {count} processes train its model{spread}")
    forget_failure(run, stage.name)
    try:
        with _silent_launcher(), _passing_on(interrupts, output.pids):
            stopped = elastic_launch(config, _process)(run_stages, str(run.path), stage.name, output, str(reports))
    except ChildFailedError as error:
        interrupts.raise_if_pending("stopped before anything was trained; run it again to continue")
        noted = failure_of(run, stage.name)
        failed = _Failed.of(reports, output, error.failures, noted["error"] if noted is not None else "")
        if not failed.lost:
            note_failure(run, stage.name, failed.message)
        raise failed.error(stage.name, count) from None
    finally:
        shutil.rmtree(reports, ignore_errors=True)
    for message, number in filter(None, stopped.values()):
        interrupts.raise_if_pending(message)  # as this process was told
        raise Interrupted(message, number)


def _check_gpus(stage: str, wanted: int, device: str) -> None:
    import torch

    if device == "cuda" and wanted > torch.cuda.device_count():
        raise UserError(
            f"launch.processes: {wanted} processes of {stage} on this machine, which has {torch.cuda.device_count()} "
            f"GPU(s), one for each; lower launch.processes, or raise launch.nodes with a launcher that gives machines"
        )


# --- in this process --------------------------------------------------------------------------------------------------


class _Output:
    """Standard output and error of this process, as those of the processes that multiprocessing starts with it among
    their arguments; it knows these from then on."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        """multiprocessing's Popen of each, in order."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Any, Any]]:
        self.started.append(context.get_spawning_popen())
        return _take_output, (reduction.DupFd(1), reduction.DupFd(2))

    def pids(self) -> list[int]:
        """Of those that run."""
        return [started.pid for started in self.started if getattr(started, "pid", None) and started.returncode is None]


def _take_output(out: Any, err: Any) -> None:
    for stream, source in ((sys.stdout, out), (sys.stderr, err)):
        stream.flush()
        os.dup2(source.detach(), stream.fileno())


@contextlib.contextmanager
def _passing_on(interrupts: Interrupts, pids: Callable[[], list[int]]) -> Iterator[None]:
    """Inside, a signal to this process goes to the others too, once to each, those that start later included."""
    ended, asked = threading.Event(), set[int]()

    def watch() -> None:
        while not ended.wait(OFTEN_S):
            for pid in pids() if interrupts.pending is not None else ():
                if pid not in asked:
                    asked.add(pid)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, SAVE_AND_END)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def _silent_launcher() -> Iterator[None]:
    """Inside, the launcher logs nothing: what it would say of a failure is told here, once."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


class _Failed(NamedTuple):
    """The failure that ended the others."""

    message: str
    kind: str = "StageFailed"
    """Class in `btx.errors`."""
    lost: bool = False
    """It lost the others only: they are on another machine, which tells why."""

    @classmethod
    def of(cls, reports: Path, output: _Output, failures: dict[int, Any], noted: str) -> _Failed:
        """What one of the processes reports; else that one hung, or was killed; else that they lost those elsewhere.

        Args:
            noted: what the first of all has noted: that they came no further, where it has not reported anything.
        """
        reported = {int(file.stem): json.loads(file.read_text("utf-8")) for file in reports.glob("[0-9]*.json")}
        first = sorted((report["lost"], report["time"], number) for number, report in reported.items())
        if not first or first[0][0]:
            number, failure = next(iter(failures.items()))
            codes = {number - failure.local_rank + place: started.returncode
                     for place, started in enumerate(output.started)}  # fmt: skip
            if noted and any(reports.glob("*.stands")):
                who = _who_hung(reports, codes)
                return cls(f"{who or 'all waited, for each other or for another machine'}; {noted}",
                           lost=not who and 0 not in codes)  # fmt: skip
            silent = sorted((rank != number, rank) for rank, code in codes.items() if code and rank not in reported)
            if silent:
                return cls(f"process {silent[0][1]} of them {_how(codes[silent[0][1]])}")
        report = reported[first[0][2]]
        return cls(report["message"], report["kind"], report["lost"])

    def error(self, stage: str, count: int) -> BtxError:
        """To be raised here."""
        kind = getattr(errors, self.kind, StageFailed)
        if kind is StageFailed:
            return StageFailed(f"{stage}, trained by {count} processes: {self.message}")
        return kind(self.message)


def _who_hung(reports: Path, ranks: Iterable[int]) -> str:
    """Which of this machine's processes the others waited for, and where it stood; an empty text if all waited. Who
    waits is in a call of torch's that lets processes meet."""
    stood = {rank: json.loads(file.read_text("utf-8")) if (file := reports / f"{rank}.stands").exists() else None
             for rank in ranks}  # fmt: skip
    hung = {rank: calls for rank, calls in stood.items()
            if calls is None or not any(MEETS in file for file, _ in calls)}  # fmt: skip
    said = [f"process {rank} of them " + (f"hung in {calls[-1][1]}" if calls else "hung and gave no answer")
            for rank, calls in hung.items()]  # fmt: skip
    return " and ".join(said)


def _how(code: int) -> str:
    """How a process without a word ended."""
    if code >= 0:
        return f"ended with exit code {code} and without a word"
    name = signal.Signals(-code).name
    return f"was ended by signal {-code} ({name})" + f": {KILLED}" * (-code == signal.SIGKILL)


# --- in each of the processes -----------------------------------------------------------------------------------------


def _process(
    run_stages: RunStages, folder: str, stage: str, output: None, reports: str
) -> tuple[str, int] | None:  # fmt: skip
    """Do the stage in this process, one of several; returns the message and signal if one stopped it. What else ends it
    is reported in a file."""
    end_with_parent()
    interrupts = Interrupts().listen()
    outcome = None
    try:
        run = RunFolder.open(Path(folder))
        with _telling_where(Path(reports), run.recipe.launch.hung_after_s):
            run_stages(run, [stage], interrupts, interrupts.tell)
    except Interrupted as stopped:
        outcome = str(stopped), stopped.exit_code - 128
    except BaseException as error:
        known = told(error) if isinstance(error, Exception) else None
        lost = is_lost(error) or isinstance(error, SystemExit)  # the first one says why it failed
        if known is None and not lost:
            traceback.print_exc()
        report = {
            "message": str(known or f"{type(error).__name__}: {error}"), "lost": lost, "time": time.time(),
            "kind": type(known).__name__ if known is not None else StageFailed.__name__,
        }  # fmt: skip
        Path(reports, f"{os.environ['RANK']}.json").write_text(json.dumps(report), "utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(known.exit_code if known is not None else 1)  # others may be gone: nothing here may wait for them
    threading.Thread(target=_end_with_starter, daemon=True).start()
    return outcome


@contextlib.contextmanager
def _telling_where(reports: Path, after_s: float | None) -> Iterator[None]:
    """Inside, say in a file where this process's main thread stands when its work comes no further: the last call of
    btx's and what that calls. Whether it is a hang, the first of all decides (`btx.process.ending_if_hung`)."""

    file = reports / f"{os.environ['RANK']}.stands"

    def tell_where(line: str) -> None:
        calls = traceback.extract_stack(sys._current_frames().get(threading.main_thread().ident or 0))
        last = max((place for place, call in enumerate(calls) if call.filename.startswith(BTX)), default=0)
        stands = [(call.filename, f"{call.name} ({Path(call.filename).name}:{call.lineno})") for call in calls[last:]]
        file.write_text(json.dumps(stands), "utf-8")

    with contextlib.nullcontext() if after_s is None else at_standstill(after_s, tell_where, file.unlink):
        yield


def _end_with_starter() -> None:
    """The launcher's part of this process waits until the launcher has read what it hands back: for ever, if that is
    gone."""
    if (starter := multiprocessing.parent_process()) is not None:
        starter.join()
        os._exit(0)


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone: as torch's backends say it."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or "gloo/transport" in str(error)
