"""Run all stages of a recipe: start jobs when what they need is done, show how far they are, stop in order.

The pipeline itself never touches a model: jobs are processes, and the run folder's files say how they went. So it can
be killed at any moment and started again.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from btx.errors import BtxError, RunFolderError, StageFailed, UserError
from btx.process import TOLD, Interrupts
from btx.recipe.derived import training_notes
from btx.recipe.schema import Recipe
from btx.run_folder.carry_over import carry_over, is_of_earlier_version
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.graph import Stage
from btx.run_folder.status import at_work, last_line, note_failure, stage_status
from btx.run_folder.stumps import clear_stumps
from btx.run_folder.threads import jobs_at_once, processors
from btx.running.launchers import START, Handle
from btx.running.log_tail import LogTail
from btx.running.preflight import check_packages, preflight
from btx.running.progress import Display
from btx.running.silence import Silence

POLL_S = 0.3
SILENT_TEXT = "stopped from outside, or its machine is gone: it gave no sign of life"
ENDED_BY = {
    9: "killed from outside; so the system ends what takes too much memory: a smaller micro_batch_tokens, "
       "gradient_checkpointing, a shorter data.sequence_length or fewer launch.jobs take less",
    7: "a file was cut off while it was read, or the disk it is on failed; the next start says which, if it is one "
       "that btx has written",
}  # fmt: skip
"""Signal (SIGKILL, SIGBUS) → what it says about a job that it ended."""


def run(
    recipe: Recipe, *, until: str | None = None, without: Collection[str] = (), display: Display | None = None,
    verify: bool = False,
) -> RunFolder:  # fmt: skip
    """Everything from nothing to the report; run again, it continues where it stopped.

    Args:
        recipe: what to run.
        until: name of the last stage wanted, for example `seed`; None for all.
        without: branches to leave out of the mix, because they failed for example; what they have stays.
        display: where progress is shown.
        verify: read every file of finished stages whole before anything starts.

    Raises:
        UserError: bad input; a run folder made by this call is removed again.
        StageFailed: jobs failed; the message holds the end of each one's log.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; all jobs have saved.
    """
    recipe = recipe.without(without) if without else recipe
    preflight(recipe)
    check_packages(recipe)
    path = Path(recipe.run_folder)
    _wanted(RunFolder(path, recipe), until)  # refused before anything is written
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    interrupts = Interrupts().listen()
    try:
        with exclusive(path, "run"):
            made = RunFolder.create(recipe)
            with display or Display() as shown:
                clear_stumps(made)
                made.check_finished(shown.say, verify=verify)
                _Pipeline(made, shown, interrupts).run(_wanted(made, until))
            return made
    except UserError:
        if path in new and not (path / "seed").exists():
            with contextlib.suppress(OSError):
                shutil.rmtree(path)
                for parent in new[1:]:
                    parent.rmdir()
        raise
    finally:
        interrupts.unlisten()


def _wanted(run: RunFolder, until: str | None) -> list[tuple[Stage, ...]]:
    """The jobs to run, cut after the stage `until`."""
    jobs = run.graph.jobs()
    if until is None:
        return jobs
    names = [stage.name for stage in run.graph]
    groups = {
        "tokenizer": run.graph.data[:1],
        "data": run.graph.data,
        "train": run.graph.branches,
        "baselines": run.graph.baselines,
    }
    if groups.get(until):
        until = groups[until][-1].name
    if until not in names:
        raise UserError(f"--until: no stage {until!r}; there are: {', '.join([*groups, *names])}")
    kept = set(names[: names.index(until) + 1])
    cut = [tuple(stage for stage in job if stage.name in kept) for job in jobs]
    return [job for job in cut if job]


@dataclass
class _Running:
    """A job under way."""

    stages: tuple[Stage, ...]
    handle: Handle
    log: Path
    tail: LogTail
    silence: Silence
    hung: bool = False
    """Ended because it gave no sign of life."""
    finished: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.stages[0].name


class _Pipeline:
    """One call of `run`."""

    def __init__(self, run: RunFolder, display: Display, interrupts: Interrupts) -> None:
        self.run_folder = run
        self.display = display
        self.interrupts = interrupts
        self.launcher = START[run.recipe.launch.kind](run.recipe.launch)
        self.at_once = jobs_at_once(run.graph)
        self.running: list[_Running] = []
        self.failures: dict[str, BtxError] = {}
        self.error_lines: dict[str, list[str]] = {}
        self.compared = False
        """Whether stages of an earlier version have been looked at."""

    def run(self, jobs: Sequence[tuple[Stage, ...]]) -> None:
        self._announce(jobs)
        waiting = [job for job in jobs if not self._is_done(job)]
        try:
            while waiting or self.running:
                self._collect()
                if self.interrupts.pending is not None:
                    break
                if not self._preparing(waiting) and not self.compared:
                    self._compare_with_earlier(waiting)
                for job in self._ready(waiting):
                    waiting.remove(job)
                    self._start(job)
                if not self.running and (waiting or self.failures):
                    break
                time.sleep(POLL_S)
        finally:
            self._end_jobs()
        if self.failures:
            self.display.say(self._summary(waiting))
        self.interrupts.raise_if_pending(f"stopped; `btx run {self.run_folder.path}` continues")
        if self.failures:
            first, *others = self.failures.values()
            raise type(first)("\n\n".join(map(str, (first, *others)))) if others else first
        if waiting:
            raise RunFolderError(self._why_waiting(waiting[0]))

    def _announce(self, jobs: Sequence[tuple[Stage, ...]]) -> None:
        """Say what is finished and what is stale, and why."""
        for note in training_notes(self.run_folder.recipe):
            self.display.say(f"note: {note}")
        earlier = is_of_earlier_version(self.run_folder)
        if earlier:
            self.display.say("an earlier version of btx made this run: its data are prepared anew and compared")
        for job in jobs:
            for stage in job:
                state = self.run_folder.state(stage)
                if earlier and state == "stale":
                    continue
                if state == "done" and stage.name != "report":
                    self.display.say(f"{stage.name}: already done, skipped")
                elif state == "stale":
                    self.display.say(f"{stage.name}: stale, will be done anew ({self.run_folder.why_stale(stage)})")
                elif state == "begun":
                    self.display.say(f"{stage.name}: begun, will be continued")

    def _is_done(self, job: tuple[Stage, ...]) -> bool:
        return all(self.run_folder.state(stage) == "done" or not self.run_folder.is_needed(stage) for stage in job)

    def _ready(self, waiting: Sequence[tuple[Stage, ...]]) -> list[tuple[Stage, ...]]:
        """Jobs whose needs are met, up to `jobs_at_once` at a time.

        Data come first, as many jobs as there are processors: so all that is wrong with them is said before anything is
        trained.
        """
        if self.failures:
            return []
        preparing = self._preparing(waiting)
        ready = []
        for job in waiting:
            inside = {stage.name for stage in job}
            needs = [needed for stage in job for needed in stage.needs if needed.name not in inside]
            if (not preparing or job in preparing) and all(self.run_folder.state(need) == "done" for need in needs):
                ready.append(job)
        return ready[: max(0, (processors() if preparing else self.at_once) - len(self.running))]

    def _preparing(self, waiting: Sequence[tuple[Stage, ...]]) -> list[tuple[Stage, ...]]:
        """Jobs that make data and are not finished."""
        return [job for job in (*waiting, *(running.stages for running in self.running)) if _prepares(job)]

    def _compare_with_earlier(self, waiting: list[tuple[Stage, ...]]) -> None:
        """Let what an earlier version has trained on the same tokens stay, and wait for it no longer."""
        self.compared = True
        if is_of_earlier_version(self.run_folder) and not self.failures:
            carry_over(self.run_folder, self.display.say)
            waiting[:] = [job for job in waiting if not self._is_done(job)]

    def _why_waiting(self, job: tuple[Stage, ...]) -> str:
        """What the jobs made is not what this run asked for: somebody changed the recipe or the data under it."""
        run, inside = self.run_folder, {stage.name for stage in job}
        missing = {
            needed.name: needed for stage in job for needed in stage.needs
            if needed.name not in inside and run.state(needed) != "done"
        }  # fmt: skip
        found = [
            f"{name} is {run.state(needed)}" + (f" ({run.why_stale(needed)})" if run.state(needed) == "stale" else "")
            for name, needed in missing.items()
        ]
        return (
            f"{run.path}: {job[0].name} cannot start: {', '.join(found)}. The recipe in the run folder, the data or "
            f"btx itself changed meanwhile; run the same command again"
        )

    def _start(self, stages: tuple[Stage, ...]) -> None:
        log = self.run_folder.path / "logs" / f"{stages[0].name.replace('/', '-')}.log"
        tail = LogTail.from_now(log)
        if (node := at_work(self.run_folder, stages[0].name)) is not None:
            self.display.say(f"{stages[0].name}: another process, on {node}, is at it; waiting for it to end")
        handle = self.launcher.submit(self.run_folder.path, [stage.name for stage in stages], log)
        silence = Silence(self.run_folder.path, [stage.name for stage in stages])
        self.running.append(_Running(stages, handle, log, tail, silence))
        self.display.begin(stages[0].name)
        self.run_folder.event("start", job=stages[0].name, **handle)

    def _collect(self) -> None:
        """Show what running jobs report, and take note of those that ended."""
        for running in list(self.running):
            exit_code = self.launcher.poll(running.handle)
            for line in running.tail.new_lines():
                self._show_line(running, line)
            for stage in running.stages:
                self._show_stage(running, stage)
            if exit_code is None:
                self._end_if_silent(running)
                continue
            self.running.remove(running)
            self.run_folder.event("end", job=running.name, exit_code=exit_code)
            if exit_code != 0 and self.interrupts.pending is None:
                self._note_failure(running, exit_code)

    def _end_if_silent(self, running: _Running) -> None:
        limit = self.run_folder.recipe.launch.hung_after_s
        if limit is not None and not running.hung and running.silence.exceeds(limit):
            running.hung = True
            self.display.say(f"{running.name}: {SILENT_TEXT}; ended")
            self.launcher.kill(running.handle)

    def _show_line(self, running: _Running, line: str) -> None:
        self.error_lines.setdefault(running.name, []).append(line)
        if line.startswith(TOLD):
            self.display.say(line.removeprefix(TOLD))

    def _show_stage(self, running: _Running, stage: Stage) -> None:
        status = stage_status(self.run_folder, stage)
        if status.state == "done" and stage.name not in running.finished:
            running.finished.add(stage.name)
            self.display.finish(stage.name, status)
        elif status.state in ("begun", "running"):
            self.display.update(status)

    def _note_failure(self, running: _Running, exit_code: int) -> None:
        """A job failed: the others go on to their end, nothing new is started."""
        lines = [line for line in self.error_lines.get(running.name, []) if not line.startswith(TOLD)]
        told = "\n".join(lines[-30:]).removeprefix("error: ")
        if running.hung:
            told += f"{SILENT_TEXT} for {self.run_folder.recipe.launch.hung_after_s} s, as launch.hung_after_s says"
        else:
            told += ENDED_BY.get(-exit_code, "")
        # A process may do several stages: the one that failed is the first that is not done.
        unfinished = [stage.name for stage in running.stages if self.run_folder.state(stage) != "done"]
        name = unfinished[0] if unfinished else running.name
        if exit_code == UserError.exit_code:
            self.failures[name] = UserError(told or last_line(told))
        else:
            how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
            note_failure(self.run_folder, name, told or how)  # a job that was killed could not
            domain = name.removeprefix("train/")
            without = f"; with --without {domain} it goes on without this expert" if domain != name else ""
            self.failures[name] = (
                StageFailed(f"{name} failed ({how}); its log is {running.log}:\n{told or last_line(told)}\n"
                            f"`btx run {self.run_folder.path}` continues from its last checkpoint{without}")
            )  # fmt: skip
        self.display.say(f"{name}: failed: {last_line(told)}")

    def _summary(self, waiting: Sequence[tuple[Stage, ...]]) -> str:
        """What failed and what was not begun for it."""
        left = [stage.name for job in waiting for stage in job]
        return f"failed: {', '.join(self.failures)}; not begun: {', '.join(left) or 'nothing'}"

    def _end_jobs(self) -> None:
        """Ask every job to save and end, and wait for it."""
        for running in self.running:
            self.launcher.cancel(running.handle)
        while any(self.launcher.poll(running.handle) is None for running in self.running):
            time.sleep(POLL_S / 3)


def _prepares(job: tuple[Stage, ...]) -> bool:
    """Whether a job makes data."""
    return job[0].name.startswith("data/")
