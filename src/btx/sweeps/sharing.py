"""Take over finished stages of other run folders instead of computing them again.

A stage's hash covers everything that decides its result (`btx.run_folder.graph`), so a stage with the same hash that is
done elsewhere is this run's stage. Its folder is made beside and renamed into place, whole or not at all. Weights and
token files become hard links: btx writes such files beside and renames, it never alters one that is there, and removing
one link leaves the other. All other files are copied, because some of them grow (metrics.jsonl) and people edit small
ones.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

from btx.errors import NotYet, RunFolderError
from btx.files import atomic_folder, link_or_copy, write_bytes, write_sealed
from btx.outputs import DONE, damage, read_done, read_started
from btx.process import Log
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.graph import Stage

PATIENCE_S = 60.0
"""How long to wait for a run that is just ending."""


def find_donors(places: Sequence[Path]) -> list[Path]:
    """Run folders among and below `places`: each is a run folder, or a sweep's folder with run folders in it.

    Raises:
        RunFolderError: a place holds no run.
    """
    donors: list[Path] = []
    for place in places:
        runs = [place] if (place / "recipe.yaml").is_file() else runs_below(place)
        if not runs:
            raise RunFolderError(f"{place}: no run folder and no sweep's folder: there is nothing to share in it")
        donors += runs
    return donors


def runs_below(folder: Path) -> list[Path]:
    """The run folders of a sweep's folder, in the order of their names."""
    return sorted(path.parent for path in folder.glob("*/rng-*/recipe.yaml"))


def donors_of(stage: Stage, donors: Sequence[Path]) -> Iterator[Path]:
    """The run folders in which this very stage, made from the same inputs, is done."""
    for donor in donors:
        begun, done = read_started(donor / stage.name), read_done(donor / stage.name)
        if begun is not None and done is not None and begun["inputs"] == done["inputs"] == stage.inputs:
            yield donor


def take_over(run: RunFolder, donors: Sequence[Path], log: Log) -> list[str]:
    """Take over every stage that is done elsewhere and not here, the trunk of what is to be trained, and measurements
    of models that stay the same.

    Args:
        run: a run folder that exists; nobody may be at work in it.
        donors: run folders to look in, the first that has a stage gives it.
        log: called with a line per stage.

    Returns:
        Names of the stages taken over.

    Raises:
        RunFolderError: the folder is in use or cannot be written.
    """
    others = [donor for donor in donors if donor.resolve() != run.path.resolve()]
    taken = []
    with exclusive(run.path, "run", patience_s=PATIENCE_S):
        for stage in run.graph:
            if run.state(stage) == "done":
                continue
            if _take_stage(run, stage, others, log):
                taken.append(stage.name)
            else:
                _take_trunk(run, stage, others, log)
        seed_is_done = run.state(run.graph["seed"]) == "done"  # a model's prediction needs its config
        if seed_is_done and run.state(run.graph["evaluate"]) in ("absent", "begun"):
            _take_measurements(run, others)
    return taken


def _take_stage(run: RunFolder, stage: Stage, others: Sequence[Path], log: Log) -> bool:
    """Take a stage over from the first run in which it is done and as it was left; those in which it is not are named.
    Returns whether there was one."""
    for donor in donors_of(stage, others):
        if (problem := damage(donor / stage.name, "used")) is None:
            with exclusive(run.path, stage.name, patience_s=PATIENCE_S):
                problem = _copy_stage(run, stage, donor, log)
        if problem is None:
            log(f"{stage.name}: taken over from {donor}")
            return True
        log(f"{stage.name}: not taken over from {donor}: {problem}")
    return False


def _copy_stage(run: RunFolder, stage: Stage, donor: Path, log: Log) -> str | None:
    """Copy a finished stage, for which a stale one gives way; returns the problem if its owner has moved it aside or
    removed it meanwhile, and has put nothing there then."""
    source, target = donor / stage.name, run.folder(stage.name)
    if run.state(stage) == "stale":
        run.set_stale_aside(stage, run.why_stale(stage), log)
    try:
        with atomic_folder(target) as beside:
            link_or_copy(source, beside)
            done = read_done(beside)
            if done is None or not source.exists():
                raise FileNotFoundError(errno.ENOENT, "it was removed meanwhile", str(source))
            write_sealed(beside / DONE, {**done, "taken_over_from": done.get("taken_over_from", str(donor))})
    except FileNotFoundError as error:
        if source not in (named := Path(error.filename or ""), *named.parents):
            raise
        return "it was removed meanwhile"
    return None


def _take_trunk(run: RunFolder, stage: Stage, others: Sequence[Path], log: Log) -> None:
    """Let a training go on from another run's checkpoint of its trunk, where that is further than its own, unless it is
    at work; what is stale gives way to it."""
    if not stage.trains or not run.is_behind(stage, others):
        return
    with contextlib.suppress(NotYet), exclusive(run.path, stage.name):
        if run.state(stage) == "stale":
            run.set_stale_aside(stage, run.why_stale(stage), log)
        run.take_trunk(stage, others, log)


def _take_measurements(run: RunFolder, donors: Sequence[Path]) -> None:
    """Copy what was measured on models that are the same here; evaluation checks their keys before it uses them."""
    from btx.evaluation.evaluate import kept_file
    from btx.stages.evaluate import models_of_run

    kept = run.folder("evaluate") / "models"
    for name, entry in models_of_run(run).items():
        record = kept_file(name)
        if (kept / record).exists() or run.path not in entry.path.parents:
            continue
        stage = entry.path.relative_to(run.path).parent
        for donor in donors:
            begun, record_there = read_started(donor / stage), donor / "evaluate" / "models" / record
            if begun and begun["inputs"] == entry.inputs and record_there.is_file():
                write_bytes(kept / record, record_there.read_bytes())
                break
