"""Run all stages of a recipe: start jobs when what they need is done, show how far they are, stop in order.

The pipeline itself never touches a model: jobs are processes, and the run folder's files say how they went. So it can
be killed at any moment and started again.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from btx.errors import NOT_YET, NotYet, RunFolderError, SystemFailed, UserError
from btx.process import FOR_THE_USER, Interrupts
from btx.recipe.derived import training_notes
from btx.recipe.schema import Recipe
from btx.run_folder.carry_over import carry_over, is_of_earlier_version
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.graph import Stage
from btx.run_folder.status import at_work, forget_failure, stage_status
from btx.run_folder.stumps import clear_stumps
from btx.run_folder.threads import jobs_at_once, processors
from btx.running.failures import SILENT, Failures
from btx.running.gpus import gpus_of
from btx.running.launchers import START, Standing
from btx.running.preflight import check_packages, preflight
from btx.running.progress import Display
from btx.running.under_way import Running, UnderWay, job_text

POLL_S = 0.3
SRUN = "srun: "
"""How lines begin that say a job's exit code once more."""
SETTLING_S = 60.0
"""Seconds after which every file system shows what another machine has written (NFS: `acdirmax`)."""


def run(
    recipe: Recipe, *, until: str | None = None, without: Collection[str] = (), display: Display | None = None,
    verify: bool = False,
) -> RunFolder:  # fmt: skip
    """Everything from nothing to the report; run again, it continues where it stopped.

    Args:
        until: name of the last stage wanted, for example `seed`; None for all.
        without: branches to leave out of the mix, because they failed for example; what they have stays.
        display: where progress is shown.
        verify: read every file of finished stages whole before anything starts.

    Raises:
        UserError: bad input; a run folder made by this call is removed again.
        StageFailed: jobs failed; the message holds the end of each one's log.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; all jobs have saved, or go on where they do so by themselves.
    """
    recipe = recipe.without(without) if without else recipe
    preflight(recipe)
    check_packages(recipe)
    path = Path(recipe.run_folder)
    before = RunFolder(path, recipe)
    left = [job for job in _wanted(before, until) if not _is_done(before, job)]  # refused before anything is written
    if left:
        START[recipe.launch.kind](recipe.launch, recipe.device).check(
            path, [[stage.name for stage in job] for job in left]
        )
        _check_gpu(recipe, left)
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with Interrupts() as interrupts, contextlib.ExitStack() as held:
            with interrupts.at_once():
                held.enter_context(exclusive(path, "run"))
            UnderWay(RunFolder(path, recipe)).find()  # refused before the run folder has another recipe
            made = RunFolder.create(recipe)
            with display or Display() as shown:
                with interrupts.at_once():  # every byte of a large run may be read
                    clear_stumps(made)
                    made.check_finished(shown.say, verify=verify)
                _Pipeline(made, shown, interrupts).run(_wanted(made, until))
            return made
    except NotYet:  # another process was faster, and what is there is its
        raise
    except UserError:
        if path in new and not (path / "seed").exists():
            with contextlib.suppress(OSError):
                shutil.rmtree(path)
                for parent in new[1:]:
                    parent.rmdir()
        raise


def _check_gpu(recipe: Recipe, left: Sequence[tuple[Stage, ...]]) -> None:
    """Refuse to train with `device: cuda` without a GPU before data are prepared, where jobs run on this machine."""
    trains = any(stage.trains for job in left for stage in job)
    if trains and recipe.device == "cuda" and recipe.launch.kind == "local":
        from btx.models.device import choose_device  # torch is imported for nobody else here

        choose_device(recipe.device)


def _wanted(run: RunFolder, until: str | None) -> list[tuple[Stage, ...]]:
    """The jobs to run, cut after the stage `until`."""
    jobs = run.graph.jobs()
    if until is None:
        return jobs
    names, groups = [stage.name for stage in run.graph], run.graph.groups
    if groups.get(until):
        until = groups[until][-1].name
    if until not in names:
        raise UserError(f"--until: no stage {until!r}; there are: {', '.join([*groups, *names])}")
    kept = set(names[: names.index(until) + 1])
    cut = [tuple(stage for stage in job if stage.name in kept) for job in jobs]
    return [job for job in cut if job]


class _Pipeline:
    """One call of `run`."""

    def __init__(self, run: RunFolder, display: Display, interrupts: Interrupts) -> None:
        self.run_folder = run
        self.under_way = UnderWay(run)
        self.display = display
        self.interrupts = interrupts
        self.gpus = len(gpus_of(run.recipe.device)) if run.recipe.launch.kind == "local" else 0
        self.at_once = jobs_at_once(run.graph, self.gpus)
        self.failures = Failures(run, display.say)
        self.unheard = False
        """Whether the engine did not answer when it was last asked."""
        self.compared = False
        """Whether stages of an earlier version have been looked at."""

    def run(self, jobs: Sequence[tuple[Stage, ...]]) -> None:
        self._announce(jobs)
        waiting = [job for job in self._not_under_way(jobs) if not _is_done(self.run_folder, job)]
        left: list[str] = []
        try:
            while waiting or self.under_way.running:
                waiting = self._in_order([*waiting, *self._collect()])
                if self.interrupts.pending is not None:
                    break
                if not self._preparing(waiting) and not self.compared:
                    self._compare_with_earlier(waiting)
                for job in self._ready(waiting):
                    waiting.remove(job)
                    self._start(job)
                if not self.under_way.running and (waiting or self.failures):
                    break
                time.sleep(POLL_S)
        except UserError:  # a job that cannot be submitted: the others would wait for it
            self.under_way.cancel([running for running in self.under_way.running if running.is_ours])
            raise
        finally:
            left = self.under_way.end()
        if self.failures:
            self.display.say(self.failures.summary(waiting))
        self.interrupts.raise_if_pending(self._stopped(left))
        self.failures.raise_first()
        if waiting:
            raise RunFolderError(self._why_waiting(waiting[0]))

    def _not_under_way(self, jobs: Sequence[tuple[Stage, ...]]) -> list[tuple[Stage, ...]]:
        """The jobs without the stages that an earlier `btx run` has submitted: those are watched from here on."""
        for running in self.under_way.find():
            self.display.say(f"{running.name}: submitted before ({job_text(running.job)}), watched from here on")
        taken = {stage.name for running in self.under_way.running for stage in running.stages}
        left = [tuple(stage for stage in job if stage.name not in taken) for job in jobs]
        return [job for job in left if job]

    def _in_order(self, waiting: list[tuple[Stage, ...]]) -> list[tuple[Stage, ...]]:
        places = {stage.name: place for place, stage in enumerate(self.run_folder.graph)}
        return sorted(waiting, key=lambda job: places[job[0].name])

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
                    then = "will be done anew" if self.run_folder.is_needed(stage) else "but nothing needs it"
                    self.display.say(f"{stage.name}: stale, {then} ({self.run_folder.why_stale(stage)})")
                elif state == "begun":
                    self.display.say(f"{stage.name}: begun, will be continued")

    def _ready(self, waiting: Sequence[tuple[Stage, ...]]) -> list[tuple[Stage, ...]]:
        """Jobs whose needs are met, up to `jobs_at_once` at a time; all where a queue can hold them until then.

        Data come first, as many jobs as there are processors: so all that is wrong with them is said before anything is
        trained.
        """
        preparing = self._preparing(waiting)
        waiting = self.failures.hold_back(waiting)
        if self.under_way.launcher.takes_waiting:
            is_settled = self.compared or not is_of_earlier_version(self.run_folder)
            return self._can_be_handed_over([job for job in waiting if is_settled or job in preparing])
        ready = [job for job in waiting if (not preparing or job in preparing) and self._has_what_it_needs(job)]
        if self.under_way.launcher.goes_on:  # a cluster has as many at once as it has room for
            return ready
        room = (processors() if preparing else self.at_once) - len(self.under_way.running)
        return self._with_free_gpus(ready)[: max(0, room)]

    def _with_free_gpus(self, jobs: Sequence[tuple[Stage, ...]]) -> list[tuple[Stage, ...]]:
        """Those for which there are GPUs that no job has, in their order: none overtakes one that waits for several.
        All where the recipe says how many jobs there are at once, and without GPUs."""
        if not self.gpus or self.run_folder.recipe.launch.jobs:
            return list(jobs)
        free, fitting = self.gpus - sum(self._gpus_of(running.stages) for running in self.under_way.running), []
        for job in jobs:
            if self._gpus_of(job) <= free:
                fitting.append(job)
                free -= self._gpus_of(job)
            else:
                free = 0
        return fitting

    def _gpus_of(self, job: Sequence[Stage]) -> int:
        """GPUs that a job takes here; what is missing is said by the job."""
        return min(self.gpus, self.run_folder.recipe.launch.gpus_of(stage.name for stage in job))

    def _can_be_handed_over(self, jobs: Sequence[tuple[Stage, ...]]) -> list[tuple[Stage, ...]]:
        """Jobs all of whose needs are done or with the same launcher, so that it can let them wait."""
        kind, with_it, elsewhere = self.run_folder.recipe.launch.kind, set[str](), []
        for running in self.under_way.running:
            if running.job.launcher == kind:
                with_it |= {stage.name for stage in running.stages}
            else:
                elsewhere.append(running.stages)
        ready = []
        for job in jobs:
            if self._missing(job).keys() <= with_it and (_prepares(job) or not any(map(_prepares, elsewhere))):
                ready.append(job)
                with_it |= {stage.name for stage in job}
        return ready

    def _missing(self, job: Sequence[Stage]) -> dict[str, Stage]:
        """What a job needs that is not done."""
        return {name: needed for name, needed in _needs(job).items() if self.run_folder.state(needed) != "done"}

    def _has_what_it_needs(self, job: Sequence[Stage]) -> bool:
        """Whether nothing is missing. Asked of every waiting job at every look, so the last made is asked first: all of
        them, data among them, took 3 % of a core."""
        return all(self.run_folder.state(needed) == "done" for needed in reversed(_needs(job).values()))

    def _preparing(self, waiting: Sequence[tuple[Stage, ...]]) -> list[tuple[Stage, ...]]:
        """Jobs that make data and are not finished."""
        stages = [running.stages for running in self.under_way.running]
        return [job for job in (*waiting, *stages) if _prepares(job)]

    def _compare_with_earlier(self, waiting: list[tuple[Stage, ...]]) -> None:
        """Let what an earlier version has trained on the same tokens stay, and wait for it no longer."""
        self.compared = True
        if is_of_earlier_version(self.run_folder) and not self.failures:
            carry_over(self.run_folder, self.display.say)
            waiting[:] = [job for job in waiting if not _is_done(self.run_folder, job)]

    def _why_waiting(self, job: tuple[Stage, ...]) -> str:
        """What the jobs made is not what this run asked for: somebody changed the recipe or the data under it."""
        run = self.run_folder
        reasons = [
            f"{name} is {run.state(needed)}" + (f" ({run.why_stale(needed)})" if run.state(needed) == "stale" else "")
            for name, needed in self._missing(job).items()
        ]
        return (
            f"{run.path}: {job[0].name} cannot start: {', '.join(reasons)}. The recipe in the run folder, the data or "
            f"btx itself changed meanwhile; run the same command again"
        )

    def _start(self, stages: tuple[Stage, ...]) -> None:
        name, missing = stages[0].name, self._missing(stages)
        if (node := at_work(self.run_folder.path, name)) is not None:
            self.display.say(f"{name}: another process, on {node}, is at it; waiting for it to end")
        needed = [running for running in self.under_way.running
                  if running.makes(missing) or (_prepares(running.stages) and not _prepares(stages))]  # fmt: skip
        for stage in stages:
            forget_failure(self.run_folder, stage.name)
        running = self.under_way.submit(stages, needed)
        running.finished |= {stage.name for stage in stages if self.run_folder.state(stage) == "done"}  # said already
        self.run_folder.event("start", job=name, **running.job.handle)
        if self.under_way.launcher.goes_on:
            self.display.say(f"{name}: submitted ({job_text(running.job)})")

    def _collect(self) -> list[tuple[Stage, ...]]:
        """Show what running jobs report, and take note of those that ended; returns those that have to be done again
        because what they need was not finished when they began, or was another."""
        again = []
        for running, standing in self._standings():
            lines = running.tail.new_lines()
            if not running.has_begun and (standing.state == "running" or lines):
                running.has_begun = True
                self.display.begin(running.first_left)
            for line in lines:
                if line.startswith(FOR_THE_USER):
                    self.display.say(line.removeprefix(FOR_THE_USER))
                elif not line.startswith(SRUN):
                    running.lines.append(line)
            for stage in running.stages:
                self._show_stage(running, stage)
            if standing.state == "queued" and running.node is not None:
                why = f" ({standing.why})" if standing.why else ""
                self.display.say(f"{running.name}: back in the queue{why}; it ran on {running.node}")
            running.node = standing.node
            if standing.state == "running":
                self._end_if_silent(running)
            if standing.state == "ended" and self._has_settled(running, standing) and self._end(running, standing):
                again.append(tuple(stage for stage in running.stages if self.run_folder.state(stage) != "done"))
        return again

    def _standings(self) -> list[tuple[Running, Standing]]:
        """How the jobs under way stand; nothing while the engine does not answer."""
        running = list(self.under_way.running)
        try:
            standings = self.under_way.poll([each.job for each in running])
        except SystemFailed as error:
            if not self.unheard:
                self.display.say(f"warning: {error}; the jobs go on, and it is asked again")
            self.unheard = True
            return []
        self.unheard = False
        return list(zip(running, standings, strict=True))

    def _has_settled(self, running: Running, standing: Standing) -> bool:
        """Whether the run folder can be believed: a shared file system may show late what another machine has
        written."""
        if standing.exit_code not in (0, None) or not self.under_way.launcher_of(running.job.launcher).goes_on:
            return True
        running.ended = running.ended or time.monotonic()
        return _is_done(self.run_folder, running.stages) or time.monotonic() - running.ended > SETTLING_S

    def _end(self, running: Running, standing: Standing) -> bool:
        """A job has ended: note if it failed; True if it has to be done again."""
        was_cancelled = running.job.cancelled
        is_cancelled = self.under_way.let_go(running).cancelled
        self.run_folder.event("end", job=running.name, exit_code=standing.exit_code)
        if _is_done(self.run_folder, running.stages) or self.interrupts.pending is not None:
            return False
        if was_cancelled:  # before this `btx run`, which only waited for it to save
            return True
        if is_cancelled:
            self.failures.cancelled(running.name)
            return False
        if standing.exit_code == NOT_YET or self._missing(running.stages):
            return True
        if standing.exit_code in (0, None) and not running.is_ours:
            return True  # nobody has seen its end, or it was begun before what it needs was made anew
        if standing.exit_code == 0:
            return False
        return self.failures.note(running.stages, standing, running.lines, silent=running.hung)

    def _end_if_silent(self, running: Running) -> None:
        limit = self.run_folder.recipe.launch.hung_after_s
        if limit is not None and not running.hung and running.silence.exceeds(limit):
            running.hung = True
            self.display.say(f"{running.name}: {SILENT}; ended")
            self.under_way.kill(running)

    def _show_stage(self, running: Running, stage: Stage) -> None:
        status = stage_status(self.run_folder, stage)
        if status.state == "done" and stage.name not in running.finished:
            running.finished.add(stage.name)
            self.display.finish(stage.name, status)
        elif status.state in ("begun", "running"):
            self.display.update(status)

    def _stopped(self, left: Sequence[str]) -> str:
        """What is said when a signal has ended this process.

        Args:
            left: jobs that go on.
        """
        path = self.run_folder.path
        if left:
            return (f"stopped watching; {', '.join(left)} go on. `btx run {path}` watches again, `btx cancel {path}` "
                    f"ends them")  # fmt: skip
        return f"stopped; `btx run {path}` continues"


def _needs(job: Sequence[Stage]) -> dict[str, Stage]:
    """What a job needs of others, in the order in which it is made."""
    inside = {stage.name for stage in job}
    return {needed.name: needed for stage in job for needed in stage.needs if needed.name not in inside}


def _is_done(run: RunFolder, job: tuple[Stage, ...]) -> bool:
    return not any(run.is_to_make(stage) for stage in job)


def _prepares(job: tuple[Stage, ...]) -> bool:
    """Whether a job makes data."""
    return job[0].name.startswith("data/")
