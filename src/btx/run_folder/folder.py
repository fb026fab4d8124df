"""The run folder: where each stage writes, what is finished, what is stale, who is at work. Plain Python.

Every stage writes only its own folder. `started.json` says for which inputs the folder was begun; `done.json`, written
last and by rename, says that it is complete. A stage without done.json is not done. A folder begun for other inputs is
stale: it is moved aside into `stale/`, never mixed with new results and never deleted.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import filelock

from btx.errors import RunFolderError
from btx.files import file_sha256, read_json, write_json, write_text
from btx.recipe.loading import dump_recipe, load_recipe
from btx.recipe.schema import Recipe
from btx.run_folder.graph import Graph, Stage, build_graph, changed_settings

State = Literal["done", "begun", "stale", "absent"]


@dataclass(frozen=True)
class RunFolder:
    """A run folder and the recipe it belongs to."""

    path: Path
    recipe: Recipe

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run folder.

        Raises:
            RunFolderError: there is none, or it holds no recipe.
        """
        if not (path / "recipe.yaml").is_file():
            raise RunFolderError(
                f"{path}: this is no run folder: recipe.yaml is missing; `btx run RECIPE` makes one, and "
                f"`btx run RECIPE --until seed` makes one whose experts can be trained by hand"
            )
        return cls(path, load_recipe(str(path)))

    @classmethod
    def create(cls, recipe: Recipe) -> RunFolder:
        """The run folder of `recipe`, made if needed; writes the resolved recipe and the manifest."""
        run = cls(Path(recipe.run_folder), recipe)
        run.path.mkdir(parents=True, exist_ok=True)
        write_text(run.path / "recipe.yaml", dump_recipe(recipe))
        write_json(run.path / "manifest.json", _manifest(run.path / "recipe.yaml"))
        return run

    @property
    def graph(self) -> Graph:
        """The stages of the run's recipe."""
        return build_graph(self.recipe)

    def folder(self, stage: str) -> Path:
        """Where a stage writes."""
        return self.path / stage

    def model(self, stage: str) -> Path:
        """The model folder a stage leaves."""
        return self.path / stage / "model"

    def done(self, stage: Stage | str) -> dict[str, Any] | None:
        """done.json of a stage, None if it is not finished."""
        name = stage if isinstance(stage, str) else stage.name
        return read_json(self.folder(name) / "done.json")

    def state(self, stage: Stage) -> State:
        """Whether a stage is done, begun, stale (begun or done for other inputs) or absent."""
        begun = read_json(self.folder(stage.name) / "started.json")
        if begun is None:
            return "absent"
        if begun["inputs"] != stage.inputs:
            return "stale"
        return "done" if self.done(stage) else "begun"

    def why_stale(self, stage: Stage) -> str:
        """The settings or earlier stages that changed since a stale stage was begun."""
        begun = read_json(self.folder(stage.name) / "started.json")
        reasons = changed_settings(begun["settings"], stage.settings)
        reasons += [
            f"{name} changed" for name, inputs in stage.upstream.items() if begun["upstream"].get(name) != inputs
        ]
        return "; ".join(reasons) or "made by another version"

    def set_aside(self, stage: Stage) -> Path:
        """Move a stale stage's folder to stale/<time>/<stage>."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        target = self.path / "stale" / stamp / stage.name
        target.parent.mkdir(parents=True, exist_ok=True)
        self.folder(stage.name).rename(target)
        return target

    def check_needs(self, stage: Stage) -> None:
        """Raise RunFolderError if a stage it needs is not finished, or finished for other inputs."""
        for needed in stage.needs:
            if self.state(needed) != "done":
                raise RunFolderError(
                    f"{stage.name} needs {needed.name}, which is {self.state(needed)}; run `btx run {self.path}` first"
                )

    def begin(self, stage: Stage) -> Path:
        """Open a stage's folder for writing and note for which inputs; raises as `check_needs`."""
        self.check_needs(stage)
        folder = self.folder(stage.name)
        folder.mkdir(parents=True, exist_ok=True)
        if self.state(stage) == "absent":
            write_json(
                folder / "started.json",
                {"stage": stage.name, "inputs": stage.inputs, "settings": stage.settings, "upstream": stage.upstream},
            )
        return folder

    def finish(self, stage: Stage, **facts: Any) -> None:
        """Write done.json: the stage is complete."""
        finished = {"stage": stage.name, "inputs": stage.inputs, **facts, "finished": _now()}
        write_json(self.folder(stage.name) / "done.json", finished)

    def event(self, kind: str, **facts: Any) -> None:
        """Append a line to events.jsonl (written by `btx run` alone)."""
        import json

        with open(self.path / "events.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": _now(), "event": kind, **facts}) + "\n")


@contextlib.contextmanager
def exclusive(run: Path, work: str, *, patience_s: float = 0.0) -> Iterator[None]:
    """Be the only process that does `work` ("run", or a stage's name) in the run folder `run`.

    Args:
        patience_s: seconds to wait for a process that is just ending.

    Raises:
        RunFolderError: another process is at it; the message names its pid.
    """
    locks = run / ".locks"
    name = work.replace("/", "-")
    owner = locks / f"{name}.pid"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(locks / f"{name}.lock", timeout=patience_s):
            owner.write_text(f"{os.getpid()} on {platform.node()}")
            try:
                yield
            finally:
                owner.unlink(missing_ok=True)
    except filelock.Timeout:
        holder = owner.read_text() if owner.exists() else "unknown"
        raise RunFolderError(
            f"{run}: {work} is in use by process {holder}; wait for it, end it, or choose another with run=FOLDER"
        ) from None
    except OSError as error:
        raise RunFolderError(
            f"{run}: cannot be written ({error.strerror or error}); choose another folder with run=FOLDER"
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _manifest(recipe: Path) -> dict[str, Any]:
    """What made this run: versions, command, git commit of the working directory, hash of the recipe."""
    packages = ("branchtrainmix", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {
        "time": _now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "versions": {name: metadata.version(name) for name in packages},
        "git": _git_commit(),
        "recipe_sha256": file_sha256(recipe),
        "timezone": time.tzname[0],
    }


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
