"""The run folder: where each stage writes, what is finished, what is stale, who is at work. Plain Python.

Every stage writes only its own folder. `started.json` says for which inputs the folder was begun; `done.json`, written
last and by rename, says that it is complete. A stage without done.json is not done. A folder begun for other inputs is
stale: it is moved aside into `stale/` once its replacement can start, never mixed with new results and never deleted.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import filelock

from btx.errors import DataError, NotYet, RunFolderError, UserError
from btx.files import named_beside, write_sealed, write_text, writing
from btx.outputs import DONE, FORMAT, STARTED, check_outputs, damage, finish, read_done, read_started
from btx.process import Log
from btx.recipe.loading import dump_recipe, load_recipe
from btx.recipe.schema import Recipe
from btx.run_folder.differences import changed_files, changed_settings
from btx.run_folder.graph import Graph, Stage
from btx.run_folder.lease import lock_file, take_lease
from btx.run_folder.manifest import manifest, now
from btx.run_folder.stage_notes import done_json, files_of, is_known, started_json
from btx.run_folder.stages_of_recipe import build_graph
from btx.run_folder.trunk import folders_of, furthest_on_trunk, furthest_step, take_trunk, trunk_steps
from btx.system_errors import WRITING, blame

State = Literal["done", "begun", "stale", "absent"]
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""What a file system without locks answers who asks for one."""


class Making(dict[str, Any]):
    """Facts of a stage being made, for its done.json: tokens, flops and whatever else is worth keeping."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        """Where the stage writes."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder and the recipe it belongs to."""

    path: Path
    recipe: Recipe

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run folder.

        Raises:
            RunFolderError: there is none, or it holds no recipe.
        """
        path = Path(path)
        if not (path / "recipe.yaml").is_file():
            absent = "" if path.exists() else ", there is no such folder here"
            raise RunFolderError(
                f"{path}: this is no run folder{absent}: recipe.yaml is missing; `btx run RECIPE` makes one, and "
                f"`btx run RECIPE --until seed` makes one whose experts can be trained by hand"
            )
        return cls(path, load_recipe(str(path)))

    @classmethod
    def create(cls, recipe: Recipe) -> RunFolder:
        """The run folder of `recipe`, made if needed; writes the resolved recipe and the manifest."""
        run = cls(Path(recipe.run_folder), recipe)
        run.path.mkdir(parents=True, exist_ok=True)
        write_text(run.path / "recipe.yaml", dump_recipe(recipe))
        write_sealed(run.path / "manifest.json", manifest(run.path / "recipe.yaml"))
        return run

    def _repr_html_(self) -> str:
        """In a notebook: the table of results and the figure of costs."""
        from btx.reporting.notebook import run_html

        return run_html(self.path, self.stale("evaluate"))

    @cached_property
    def graph(self) -> Graph:
        """The stages of the run's recipe, as things stand when it is first asked for."""
        return build_graph(self.recipe, self.recorded, self._read_by_others, self.begun)

    def recorded(self, stage: str) -> dict[str, Any] | None:
        """started.json of a stage that is finished, None if it is not. What a domain was when models were trained on it
        is known from these too, where its own folder was left behind."""
        begun, done = self.begun(stage), self.done(stage)
        if begun and done and begun["inputs"] == done["inputs"]:
            return begun
        return self._read_by_others.get(stage) if stage.startswith("data/") else None

    def begun(self, stage: str) -> dict[str, Any] | None:
        """started.json of a stage that is begun or finished, None if there is none of this format."""
        begun = read_started(self.folder(stage))
        return begun if begun and begun.get("format") == FORMAT else None

    @cached_property
    def _read_by_others(self) -> dict[str, dict[str, Any]]:
        """Data stage → its started.json as noted by the finished stages that have read it."""
        noted: dict[str, dict[str, Any]] = {}
        for stage in ("finetune", *(f"train/{domain}" for domain in self.recipe.train.domains), "seed"):
            begun = self.begun(stage)
            if begun is not None and self.done(stage):
                noted |= begun["read"]
        return noted

    def prepared(self) -> dict[str, Path]:
        """Domain → its folder, of those whose data are done."""
        done = [domain for domain in self.recipe.data.domains if self.state(self.graph[f"data/{domain}"]) == "done"]
        return {domain: self.folder(f"data/{domain}") for domain in done}

    def folder(self, stage: str) -> Path:
        """Where a stage writes."""
        return self.path / stage

    def model(self, stage: str) -> Path:
        """The model folder a stage leaves."""
        return self.path / stage / "model"

    def done(self, stage: Stage | str) -> dict[str, Any] | None:
        """done.json of a stage, None if it is not finished."""
        name = stage if isinstance(stage, str) else stage.name
        return read_done(self.folder(name))

    def state(self, stage: Stage) -> State:
        """Whether a stage is done, begun, stale (begun or done for other inputs) or absent.

        What cannot be known here, because neither a stage nor what it is made from is in the folder, makes nothing
        stale: an expert's folder may travel with its own needs alone.
        """
        begun = read_started(self.folder(stage.name))
        if begun is None:
            return "absent"
        if begun.get("format") != FORMAT or self._differs(stage, begun):
            return "stale"
        gone = stage.name == "seed" and self.model("seed").is_symlink() and not self.model("seed").exists()
        return "done" if self.done(stage) and not gone else "begun"  # a link to an existing model may lead nowhere now

    def _differs(self, stage: Stage, begun: Mapping[str, Any]) -> bool:
        try:
            return stage.inputs != begun["inputs"]
        except UserError:
            if not is_known(stage, "settings"):
                return self.done(stage) is not None  # made from other files than those that are missing now
            known = [needed for needed in stage.needs if is_known(needed, "inputs")]
            if any(begun["upstream"].get(needed.label) != needed.inputs for needed in known):
                return True
            return stage.settings != begun["settings"]

    def why_stale(self, stage: Stage) -> str:
        """The settings, files or earlier stages that changed since a stale stage was begun."""
        begun = read_started(self.folder(stage.name)) or {}
        if begun.get("format") != FORMAT:
            may_stay = f"; `btx run {self.path}` sees whether it can stay" * (self.path / "data/started.json").is_file()
            return f"an earlier version of btx made it{may_stay}"
        try:
            stage.inputs  # noqa: B018 - raises where files are missing
        except UserError as error:
            return str(error)
        reasons = changed_settings(stage.name, begun["shown"], stage.shown)
        reasons += changed_files(begun["files"], files_of(stage))
        before = begun["upstream"]
        reasons += [
            f"{name} {'changed' if name in before else 'is new'}"
            for name, inputs in stage.upstream.items() if before.get(name) != inputs
        ]  # fmt: skip
        reasons += [f"{name} is gone" for name in before if name not in stage.upstream]
        if not reasons and begun["settings"] != stage.settings:
            reasons = ["its files are read in another order"]
        return "; ".join(reasons) or "made by another version"

    def stale(self, *names: str) -> dict[str, str]:
        """Of these stages those that are stale → why."""
        return {name: self.why_stale(self.graph[name]) for name in names if self.state(self.graph[name]) == "stale"}

    def is_needed(self, stage: Stage) -> bool:
        """Whether a run has to make a stage that is not done: data and seed model only if something unfinished needs
        them, so that a run whose data/ or seed/ stayed elsewhere is as finished as it is."""
        if stage.name != "seed" and not stage.name.startswith("data/"):
            return True
        return any(self.is_to_make(other) for other in self.graph if stage in other.needs)

    def is_to_make(self, stage: Stage) -> bool:
        """Whether a run still has to make a stage: it is not done, and it is needed."""
        return self.state(stage) != "done" and self.is_needed(stage)

    def unfinished_needs(self, stage: Stage) -> list[Stage]:
        """What has to be made before a stage, in an order that runs. Nothing stale: `btx run` does that, and says so
        first."""
        behind = {name for needed in stage.needs for name in self._behind(needed)}
        return [needed for needed in self.graph if needed.name in behind and self.state(needed) in ("absent", "begun")]

    def _behind(self, stage: Stage) -> set[str]:
        """A stage's name and those of all it needs, as far as they are not finished."""
        if self.state(stage) == "done":
            return set()
        return {stage.name}.union(*(self._behind(needed) for needed in stage.needs))

    def set_aside(self, stage: str) -> Path:
        """Move a stage's folder to stale/<time>/<stage>."""
        target = place_aside(self.path, stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.folder(stage).rename(target)
        return target

    def check_needs(self, stage: Stage) -> None:
        """Refuse a stage whose needs are not finished, or are not as they were left.

        Raises:
            NotYet: a stage it needs is not finished.
            RunFolderError: a stage it needs was finished for other inputs, or one of its files was damaged or replaced.
        """
        for needed in stage.needs:
            if (state := self.state(needed)) != "done":
                why = f" ({self.why_stale(needed)})" if state == "stale" else ""
                raise (RunFolderError if why else NotYet)(
                    f"{stage.name} needs {needed.name}, which is {state}{why}; run `btx run {self.path}` first"
                )
            check_outputs(self.folder(needed.name))

    def check_finished(self, log: Log, *, verify: bool = False) -> None:
        """Look at what finished stages have left, before anything is started.

        What a stage that is still to be made will read has to be as it was left. Of all else small files and sizes are
        looked at, and what is wrong is only told: nothing is waiting for it.

        Args:
            verify: read every byte of every finished stage, and refuse what is wrong anywhere.

        Raises:
            RunFolderError: names the file.
        """
        states = {stage.name: self.state(stage) for stage in self.graph}
        to_make = [stage for stage in self.graph if states[stage.name] != "done" and self.is_needed(stage)]
        used = {needed.name for stage in to_make for needed in stage.needs}
        for stage in self.graph:
            if states[stage.name] == "done":
                needed = verify or stage.name in used
                problem = damage(self.folder(stage.name), "whole" if verify else "used" if needed else "quick")
                if problem is not None and needed:
                    raise RunFolderError(problem)
                if problem is not None:
                    log(f"warning: {problem}")

    @contextlib.contextmanager
    def making(self, stage: Stage, log: Log) -> Iterator[Making]:
        """Make a stage: the block fills its folder and adds facts; without an error done.json is written at its end.

        A stale folder gives way when it is sure that its replacement can start: before training, so whatever can be
        refused is refused before the block is entered; for all else, made beside, when the replacement is complete.

        Raises:
            RunFolderError: a stage it needs is not finished, finished for other inputs, or has changed meanwhile: then
                nothing is kept. Training asks itself before it keeps anything.
        """
        self.check_needs(stage)
        started, folder = time.perf_counter(), self.folder(stage.name)
        state = self.state(stage)
        why = self.why_stale(stage) if state == "stale" else ""
        if stage.trains:
            if state == "stale":
                self.set_stale_aside(stage, why, log)
            self.take_trunk(stage, (), log)
        working = folder if stage.trains else named_beside(folder, "making")
        begun = read_started(working)
        if not stage.trains and working.exists() and (begun is None or begun["inputs"] != stage.inputs):
            shutil.rmtree(working)  # left by a process that was killed and that made something else
        working.mkdir(parents=True, exist_ok=True)
        (working / DONE).unlink(missing_ok=True)  # of a process that was killed before its last rename
        begun = started_json(stage)
        write_sealed(working / STARTED, begun)  # anew: files may be elsewhere than when it was begun
        facts = Making(working)
        try:
            yield facts
        except UserError:
            if not stage.trains:  # what it read may have been found changed only by the block itself
                self._discard_if_inputs_changed(stage, begun["files"], working)
            raise
        if not stage.trains:
            self._discard_if_inputs_changed(stage, begun["files"], working)
        wall_s = round(time.perf_counter() - started, 3)
        finish(working, done_json(stage, {"wall_s": wall_s} | facts))
        if working != folder:
            if state == "stale":
                self.set_stale_aside(stage, why, log)
            replaced = named_beside(folder, "replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            if folder.exists():
                folder.rename(replaced)
            working.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)

    def _discard_if_inputs_changed(self, stage: Stage, files: Mapping[str, str], working: Path) -> None:
        """Keep nothing of a stage whose needs, or whose own `files`, changed while it read them."""
        try:
            self.check_needs(stage)
            if changed := changed_files(files, files_of(stage)):
                raise DataError(f"{stage.name}: {'; '.join(changed)} while it was read; run the same command again")
        except UserError:
            shutil.rmtree(working)
            raise

    def set_stale_aside(self, stage: Stage, why: str, log: Log) -> None:
        """Move the folder of a stage that is stale as `set_aside` does, and say why."""
        aside = self.set_aside(stage.name)
        log(f"{stage.name}: stale ({why}); moved to {aside}")

    def take_trunk(self, stage: Stage, others: Sequence[Path], log: Log) -> None:
        """Let a training go on from the furthest checkpoint of its trunk that another run has left, or this one before
        its stage was set aside: whoever was killed then, or found the other's checkpoint damaged, loses no step.

        Args:
            others: run folders.
        """
        if stage.trunk is not None:
            donors = [folder for run in (self.path, *others) for folder in folders_of(run, stage.name)]
            take_trunk(stage.trunk, trunk_steps(stage.shown), self.folder(stage.name), donors, log)

    def is_behind(self, stage: Stage, others: Sequence[Path]) -> bool:
        """Whether one of `others` has made more of a training's trunk than is left of it here; as for `take_trunk`."""
        if stage.trunk is None:
            return False
        here, steps = self.folder(stage.name), trunk_steps(stage.shown)
        is_other = self.state(stage) == "stale"  # of which a part may be on this trunk all the same
        own = furthest_on_trunk(stage.trunk, steps, [here]) if is_other else furthest_step(here)
        donors = [folder for run in others for folder in folders_of(run, stage.name)]
        return furthest_on_trunk(stage.trunk, steps, donors) > own

    def event(self, kind: str, **facts: Any) -> None:
        """Append a line to events.jsonl (written by `btx run` alone)."""
        path = self.path / "events.jsonl"
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now(), "event": kind, **facts}) + "\n")


def place_aside(folder: Path, name: str) -> Path:
    """A path that is not there yet for what is stale of a run's or a sweep's folder: stale/<time>/<name>."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    numbers = itertools.count()  # a clock that was set back says the same time twice
    target = folder / "stale" / stamp / name
    while target.exists():
        target = folder / "stale" / f"{stamp}-{next(numbers)}" / name
    return target


@contextlib.contextmanager
def exclusive(run: Path, work: str, *, patience_s: float = 0.0) -> Iterator[None]:
    """Be the only process that does `work` ("run", or a stage's name) in the run folder `run`, on any machine that sees
    it, whether or not its file system has locks (`btx.run_folder.lease`).

    Args:
        patience_s: seconds to wait for a process that is just ending.

    Raises:
        NotYet: another process is at it; the message names its pid.
    """
    owner = lock_file(run, work, "pid")
    lock = filelock.FileLock(lock_file(run, work, "lock"), timeout=patience_s, fallback_to_soft=False)
    lease = None
    try:
        owner.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except OSError as error:
            if isinstance(error, filelock.Timeout) or error.errno not in NO_LOCKS:
                raise
        lease = take_lease(lock_file(run, work, "lease"), patience_s)
        owner.write_text(f"{os.getpid()} on {platform.node()}")
    except filelock.Timeout:
        lock.release()
        holder = owner.read_text() if owner.exists() else "unknown"
        raise NotYet(
            f"{run}: {work} is in use by process {holder}; wait for it, end it, or choose another with run=FOLDER"
        ) from None
    except OSError as error:
        if lease is not None:
            lease.release()
        lock.release()
        if error.errno not in WRITING:
            blame(error)
        raise RunFolderError(
            f"{run}: cannot be written ({error.strerror or error}); choose another folder with run=FOLDER"
        ) from error
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        lease.release()
        lock.release()
