"""`btx sweep`: run every variant of a recipe with several rng seeds, computing what they have in common once.

Each run is an ordinary run folder in an ordinary `btx run` process. Before it starts, it takes over every stage that
another run has finished (`btx.sweeps.sharing`); and it waits while a stage it lacks is being made by a run under way.
So variants that differ in finetuning alone train one seed model and one set of experts per rng seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from btx.errors import RunFolderError, StageFailed, UserError, first_few
from btx.evaluation.aggregate import aggregate, read_results
from btx.files import read_json, write_sealed, write_text
from btx.process import Interrupts, Log
from btx.run_folder.folder import RunFolder, exclusive, place_aside
from btx.run_folder.graph import Stage
from btx.run_folder.trunk import all_steps, checkpoints_on_trunk, folders_of, trunk_steps
from btx.running.launchers.local import LocalProcess
from btx.running.log_tail import LogTail
from btx.sweeps.sharing import PATIENCE_S, donors_of, find_donors, runs_below, take_over
from btx.sweeps.table import sweep_markdown
from btx.sweeps.variants import OWN_FILES, SweepPlan, SweepRun, run_name
from btx.system_errors import told

POLL_S = 0.3
LINES_SHOWN = 15  # of a failed run's log
SHOWN = 4  # names of runs in a line
Start = Callable[[SweepRun, Path], LocalProcess]
"""Starts the run whose folder is made; its output goes to the given file."""


def sweep(
    plan: SweepPlan, start: Start, *, share: Sequence[Path] = (), jobs: int = 1, log: Log
) -> dict[str, Any]:  # fmt: skip
    """Run everything that is not finished; write sweep.json, sweep.md and sweep.svg. Those of another sweep in the same
    folder are set aside before (`not_of_this_sweep`).

    Args:
        plan: what to run, checked.
        start: starts one run.
        share: run folders, or sweeps' folders, whose finished stages may be taken over too.
        jobs: runs at a time.

    Returns:
        What sweep.json holds.

    Raises:
        UserError: nothing to share in `share`, or the folder is in use.
        StageFailed: some runs failed; all others were run to their end and are in sweep.json.
        Interrupted: SIGINT or SIGTERM; all runs have saved.
    """
    donors = find_donors(share)
    with Interrupts() as interrupts, exclusive(plan.folder, "sweep"):
        set_earlier_aside(plan, log)
        failures = _Sweep(plan, start, donors, jobs, log, interrupts).run()
        written = write_sweep(plan, failures, figures=True)
    if failures:
        count = f"{len(failures)} of {len(plan.runs)} runs failed; the same command runs them again"
        raise StageFailed("\n".join([f"{count}:", *(f"{name}: {text}" for name, text in failures.items())]))
    return written


class RunOfSweep(TypedDict):
    """A run's line in sweep.json."""

    rng_seed: int
    folder: str
    state: NotRequired[str]


class VariantOfSweep(TypedDict):
    """A variant's entry in sweep.json."""

    runs: list[RunOfSweep]


class SweepFile(TypedDict):
    """sweep.json, as far as it is read again."""

    variants: dict[str, VariantOfSweep]


def runs_in(folder: Path) -> list[tuple[str, int, Path]]:
    """Variant, rng seed and run folder of every run of a sweep's folder.

    Raises:
        RunFolderError: there is no sweep.json any more, or it is not as btx writes it.
    """
    written = read_json(folder / "sweep.json", SweepFile)
    if written is None:
        raise RunFolderError(f"{folder}: sweep.json is gone")
    return [(label, run["rng_seed"], Path(run["folder"])) for label, variant in written["variants"].items()
            for run in variant["runs"]]  # fmt: skip


def not_of_this_sweep(plan: SweepPlan) -> str:
    """What sweep.json of the plan's folder tells and would no more, once this sweep writes its own: finished runs that
    are not among the plan's, or are to be made anew; empty if there is none."""
    path = plan.folder / "sweep.json"
    try:
        written = read_json(path, SweepFile)
    except RunFolderError as error:
        return str(error)
    done = {run.name for run in plan.runs if not run.unfinished()}
    gone = [name for label, variant in (written["variants"] if written else {}).items() for run in variant["runs"]
            if run.get("state") == "done" and (name := run_name(label, run["rng_seed"])) not in done]  # fmt: skip
    if not gone:
        return ""
    named = first_few(gone, SHOWN, "; and {} more", "; ")
    return f"{path} tells of finished runs that this sweep has not, or makes anew: {named}"


def set_earlier_aside(plan: SweepPlan, log: Log) -> None:
    """Move another sweep's sweep.json, sweep.md and sweep.svg to stale/<time>/; its runs stay where they are."""
    if not (why := not_of_this_sweep(plan)):
        return
    aside = place_aside(plan.folder, OWN_FILES[0]).parent
    aside.mkdir(parents=True, exist_ok=True)
    for file in reversed(OWN_FILES):  # sweep.json last: whoever is killed before finds the same reason again
        if (plan.folder / file).exists():
            (plan.folder / file).rename(aside / file)
    log(f"{why}. What it says of them is in {aside} now; the runs themselves stay, and are shared")


def sweep_state(plan: SweepPlan, donors: Sequence[Path]) -> list[dict[str, Any]]:
    """Where each run stands: {"variant", "rng_seed", "folder", "stages": {NAME: state}, "goes_on": {NAME: share of its
    steps that it need not make, as they are on another's trunk}}.

    States are those of a run's stages, and `shared` for a stage that is not there yet and will be taken over, or made
    by an earlier run of the sweep.
    """
    rows, made_before, trunks = [], set[str](), dict[tuple[str, str], set[int]]()
    everywhere = [*runs_below(plan.folder), *donors]
    for run in plan.runs:
        stages, goes_on = dict[str, str](), dict[str, float]()
        for stage in run.stages:
            state: str = run.run_folder.state(stage)
            if state != "done" and (stage.inputs in made_before or any(donors_of(stage, everywhere))):
                state = "shared"
            stages[stage.name] = state
            made_before.add(stage.inputs)
            share = _share_on_trunk(stage, trunks, everywhere)
            if share and state not in ("done", "shared"):
                goes_on[stage.name] = share
        rows.append({"variant": run.variant.label, "rng_seed": run.rng_seed, "folder": str(run.folder),
                     "stages": stages, "goes_on": goes_on})  # fmt: skip
    return rows


def _share_on_trunk(stage: Stage, trunks: dict[tuple[str, str], set[int]], donors: Sequence[Path]) -> float:
    """Share of a training's steps that are made on its trunk already; 0 for what has none.

    Args:
        trunks: stage and trunk → steps made until now; those of this training are added.
        donors: run folders with checkpoints; each trunk is looked for once.
    """
    if not stage.trains or stage.trunk is None:
        return 0.0
    made = trunks.get((stage.name, stage.trunk))
    if made is None:
        folders = [folder for donor in donors for folder in folders_of(donor, stage.name)]
        made = {step for folder in folders for step, _ in checkpoints_on_trunk(folder, stage.trunk)}
    steps = trunk_steps(stage.shown)
    furthest = max((step for step in made if step <= steps), default=0)
    trunks[stage.name, stage.trunk] = made | {steps}
    return furthest / all_steps(stage.shown)


def write_sweep(plan: SweepPlan, failures: dict[str, str] | None = None, *, figures: bool = False) -> dict[str, Any]:
    """Write what is known so far to the sweep's folder and return it, as sweep.json holds it:

    {"name", "folder", "rng_seeds", "models", "variants": {LABEL: {"settings": {KEY: value}, "runs": [{"rng_seed",
    "folder", "state": "done" | "begun" | "absent" | "failed", "failure"}], "aggregated": as
    `btx.evaluation.aggregate`, over the runs that are done, with their "rng_seeds" in the order of all "values";
    null before}}}
    """
    variants: dict[str, Any] = {}
    for variant in plan.variants:
        runs = [_run_facts(run, failures or {}) for run in plan.runs if run.variant == variant]
        done = [run for run in runs if run["state"] == "done"]
        aggregated = aggregate(read_results([Path(run["folder"]) for run in done])) if done else None
        if aggregated:
            aggregated["rng_seeds"] = [run["rng_seed"] for run in done]
        variants[variant.label] = {"settings": variant.settings, "runs": runs, "aggregated": aggregated}
    written = {"name": plan.name, "folder": str(plan.folder), "rng_seeds": plan.rng_seeds, "models": plan.models,
               "variants": variants}  # fmt: skip
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_sealed(plan.folder / "sweep.json", written)
    write_text(plan.folder / "sweep.md", sweep_markdown(written))
    if figures and any(variant["aggregated"] for variant in variants.values()):
        from btx.sweeps.figure import sweep_figure

        write_text(plan.folder / "sweep.svg", sweep_figure(written))
    return written


def _run_facts(run: SweepRun, failures: dict[str, str]) -> dict[str, Any]:
    states = {run.run_folder.state(stage) for stage in run.stages}
    state = "done" if states == {"done"} else "failed" if run.name in failures else (
        "absent" if states == {"absent"} else "begun")  # fmt: skip
    facts = {"rng_seed": run.rng_seed, "folder": str(run.folder), "state": state}
    return facts | ({"failure": failures[run.name]} if state == "failed" else {})


def _to_make(run: SweepRun) -> set[str]:
    """Hashes of the stages that a run has yet to make, and of the trunks of those that train."""
    stages = run.unfinished()
    return {stage.inputs for stage in stages} | {stage.trunk for stage in stages if stage.trains and stage.trunk}


@dataclass
class _Running:
    """A run under way."""

    run: SweepRun
    job: LocalProcess
    log: LogTail
    lines: list[str] = field(default_factory=list)

    def new_lines(self) -> list[str]:
        """Whole lines its log has got since the last call."""
        lines = self.log.new_lines()
        self.lines = [*self.lines, *lines][-LINES_SHOWN:]
        return lines


@dataclass
class _Sweep:
    """One call of `sweep`."""

    plan: SweepPlan
    start: Start
    donors: Sequence[Path]
    jobs: int
    log: Log
    interrupts: Interrupts
    running: list[_Running] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def run(self) -> dict[str, str]:
        """Run all; returns failed runs → why."""
        waiting = [run for run in self.plan.runs if run.unfinished()]
        finished = len(self.plan.runs) - len(waiting)
        if finished:
            self.log(f"{finished} of {len(self.plan.runs)} runs are done already")
        write_sweep(self.plan)
        try:
            while waiting or self.running:
                self._collect()
                self.interrupts.raise_if_pending("stopped; the same command continues")
                while len(self.running) < self.jobs and (run := self._next(waiting)) is not None:
                    waiting.remove(run)
                    self._begin(run)
                if self.running:
                    time.sleep(POLL_S)
        finally:
            for running in self.running:
                running.job.terminate()
            for running in self.running:
                running.job.wait()
        return self.failures

    def _next(self, waiting: Sequence[SweepRun]) -> SweepRun | None:
        """The first run none of whose missing stages is being made by another one."""
        claimed = set[str]().union(*(_to_make(running.run) for running in self.running))
        return next((run for run in waiting if not _to_make(run) & claimed), None)

    def _begin(self, run: SweepRun) -> None:
        number = self.plan.runs.index(run) + 1
        self.log(f"run {number} of {len(self.plan.runs)}: {run.name}, in {run.folder}")
        try:
            with exclusive(run.folder, "run", patience_s=PATIENCE_S):
                made = RunFolder.create(run.recipe)
            take_over(made, [*runs_below(self.plan.folder), *self.donors], lambda line: self._say(run, line))
            self._check_data(made)
            if not run.unfinished():
                self.log(f"done: {run.name}: nothing was left to do")
                return
            output = run.folder / "logs" / "run.log"
            output.parent.mkdir(exist_ok=True)
            tail = LogTail.from_now(output)
            job = self.start(run, output)
        except (UserError, OSError) as error:  # what one run cannot read stops no other
            self._fail(run, str(told(error)))
            return
        self.running.append(_Running(run, job, tail))

    def _check_data(self, made: RunFolder) -> None:
        """Token files of another run were checked against that run's budgets: check them against this one's."""
        if prepared := made.prepared():
            from btx.planning.budgets import check_budgets

            check_budgets(made.recipe, prepared)

    def _collect(self) -> None:
        for running in list(self.running):
            exit_code = running.job.exit_code()
            for line in running.new_lines():
                self._say(running.run, line)
            if exit_code is None:
                continue
            self.running.remove(running)
            if self.interrupts.pending is not None:
                continue
            if exit_code == 0:
                self.log(f"done: {running.run.name}")
                write_sweep(self.plan, self.failures)
            else:
                how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
                end = "\n".join(running.lines)
                self._fail(running.run, f"{how}; its log is {running.job.log}:\n{end}")

    def _fail(self, run: SweepRun, why: str) -> None:
        self.failures[run.name] = why
        self.log(f"failed: {run.name}: {why}")
        write_sweep(self.plan, self.failures)

    def _say(self, run: SweepRun, line: str) -> None:
        self.log(f"  {line}" if self.jobs == 1 else f"  [{run.name}] {line}")
