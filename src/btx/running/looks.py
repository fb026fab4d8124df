"""What there is to see of a run at a moment: one row a job, from the files of its run folder. Plain Python."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from btx.choices.baselines import BASELINES, DOMAINS
from btx.metrics_file import MetricsTail
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.run_folder.jobs import Job
from btx.run_folder.status import at_work, lost_on, owner_of, stage_status
from btx.running.launchers import Standing
from btx.running.under_way import add_known, standings_of

ASK_EVERY_S = 5.0
"""Seconds between two questions to a cluster, however often is looked."""
UNDER_WAY = ("running", "queued")
"""States of a stage that somebody is at, or will be."""


@dataclass(frozen=True)
class Row:
    """A stage of a run, or a run of a sweep."""

    name: str
    state: str
    """As `btx status` has it."""
    note: str = ""
    """Where it runs, or why it does not."""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    losses: Sequence[float] = ()
    load: Mapping[str, float] = field(default_factory=dict)
    """Expert → its share of the routed tokens in the last step, mean over layers; empty for a dense model."""
    dead: int = 0
    """Dead experts, over all layers."""
    spikes: int = 0
    skipped: int = 0
    """How many of the spikes were left out (`on_spike: skip`)."""


@dataclass(frozen=True)
class Look:
    """All of it at a moment."""

    title: str
    rows: Sequence[Row]
    remarks: Sequence[str] = ()
    """What could not be found out."""
    is_under_way: bool = False
    is_done: bool = False
    failed: Sequence[str] = ()
    """What has failed, or ended without a word, and why."""


class Watched(Protocol):
    """What can be looked at again and again: a run, or a sweep (`btx.sweeps.looks`)."""

    path: Path

    def look(self) -> Look:
        """How things stand now.

        Raises:
            UserError: a file is not as btx writes it, or the folder is gone.
            OSError: the folder cannot be read.
        """
        ...


class WatchedRun:
    """A run, looked at from any machine that sees its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._recipe: tuple[int, int] | None = None
        self._tails: dict[str, MetricsTail] = {}
        self._asked = -math.inf
        self._standings: list[tuple[Job, Standing]] = []
        self._problems: list[str] = []

    def look(self) -> Look:
        run = self._opened()
        statuses = [asdict(stage_status(run, stage)) for stage in run.graph]
        if time.monotonic() - self._asked >= ASK_EVERY_S:
            self._standings, self._problems = standings_of(run)
            self._asked = time.monotonic()
        add_known(statuses, self._standings)
        rows = [self._row(run, stage, status) for stage, status in zip(run.graph, statuses, strict=True)]
        is_done = all(
            row.state == "done" or not run.is_needed(stage) for stage, row in zip(run.graph, rows, strict=True)
        )
        runner, killed = at_work(run.path, "run"), owner_of(self.path, "run")
        ended = [row for row in rows if row.state == "failed" or (row.state == "begun" and row.note)]
        failed = [f"{row.name}: {row.note}" for row in ended]
        if runner is None and killed is not None:
            failed.append(f"btx run: {lost_on(killed[1])}")
        launcher = run.recipe.launch.kind
        where = f"btx run on {runner}" if runner else "no btx run"
        under_way = runner is not None or any(row.state in UNDER_WAY for row in rows)
        waits = bool(self._problems) and not is_done  # a job that cannot be asked about may go on
        return Look(f"{run.recipe.name}, {self.path}: launcher {launcher}, {where}", rows, tuple(self._problems),
                    under_way or waits, is_done, failed)  # fmt: skip

    def _opened(self) -> RunFolder:
        """The run, opened anew only where another `btx run` has changed its recipe: a graph may have to read data."""
        try:
            status = (self.path / "recipe.yaml").stat()
            now = (status.st_ino, status.st_mtime_ns)
        except FileNotFoundError:
            now = None  # which is told as such
        if now is None or now != self._recipe:
            self._run, self._recipe = RunFolder.open(self.path), now
        return self._run

    def _row(self, run: RunFolder, stage: Stage, status: Mapping[str, Any]) -> Row:
        name, state = stage.name, status["state"]
        tail = self._tails.setdefault(name, MetricsTail(run.folder(name) / "metrics.jsonl"))
        if stage.trains and state not in ("absent", "stale"):
            tail.look()
        elif tail.steps:
            tail = self._tails[name] = MetricsTail(tail.path)
        load = (tail.last or {}).get("load", []) if state != "done" else []
        return Row(
            name, state, _note(status), status["step"], status["steps"], status["loss"], status["tokens_per_s"],
            status["eta_s"] if state != "begun" else None,
            [step.loss for step in tail.steps if step.loss is not None], _mean_load(load, _experts(run, name)),
            len((tail.last or {}).get("dead", [])) if load else 0,
            sum(step.spike for step in tail.steps), sum(step.skipped for step in tail.steps),
        )  # fmt: skip


def _note(status: Mapping[str, Any]) -> str:
    where = f"on {status['node']}" if status["state"] == "running" and status["node"] else ""
    together = f"{status['processes']} processes" if status["processes"] > 1 and where else ""
    return ", ".join(part for part in (where, together, status["why"]) if part)


def _experts(run: RunFolder, stage: str) -> list[str]:
    """Names of the experts of a stage's model; those of an upcycled one have none."""
    kind = BASELINES.get(stage.removeprefix("baselines/").removesuffix(DOMAINS))
    return [] if kind is not None and kind.start == "upcycled" else run.recipe.expert_names


def _mean_load(load_LE: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, float]:
    """Mean over layers; layers of another width than the first are left out."""
    layers = [layer for layer in load_LE if len(layer) == len(load_LE[0])]
    means = [math.fsum(shares) / len(layers) for shares in zip(*layers, strict=True)]
    return {names[number] if number < len(names) else f"expert {number}": mean for number, mean in enumerate(means)}
