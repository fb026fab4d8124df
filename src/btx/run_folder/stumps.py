"""What killed writers have left behind goes at the next start, where no living process is at it. Plain Python.

Everything is written beside and renamed (`btx.files`, `RunFolder.making`), so a stump is never part of a result. It is
its owner's as long as that one holds the stage's lock.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from btx.errors import RunFolderError
from btx.files import WRITTEN_BESIDE, named_beside
from btx.outputs import DONE
from btx.run_folder.folder import RunFolder, exclusive
from btx.run_folder.graph import Stage


def clear_stumps(run: RunFolder) -> None:
    """Clear those of all stages nobody is at, of stages that the recipe has no more, and of the run folder's own files;
    for the process that holds the run, before it asks for the graph. An adoption that was killed between its last two
    renames is ended."""
    for adopting in run.folder("train").glob(".*.adopting"):  # before the graph asks which branches are adopted
        name = f"train/{adopting.stem[1:]}"
        with contextlib.suppress(RunFolderError), exclusive(run.path, name):
            _end_renaming(adopting, run.folder(name))
    names = {stage.name: stage for stage in run.graph}
    for group in ("", "data/", "train/", "baselines/"):
        for path in (run.path / group).glob(".*"):
            matched = WRITTEN_BESIDE.fullmatch(path.name)
            name = group + matched[1] if matched else ""
            if matched and (run.path / name).is_file():
                _remove(path)  # a file of the run folder itself, which only this process writes
            elif matched and name not in names:
                _clear_if_free(run, name, None)
    for name, stage in names.items():
        _clear_if_free(run, name, stage)


def _clear_if_free(run: RunFolder, name: str, stage: Stage | None) -> None:
    if not (_beside(run.folder(name)) or _inside(run.folder(name))):
        return
    with contextlib.suppress(RunFolderError), exclusive(run.path, name):
        clear_stumps_of(run, name, stage)


def clear_stumps_of(run: RunFolder, name: str, stage: Stage | None) -> None:
    """Clear those of one stage, for the process that holds it.

    What a process that was killed has made of a stage that is not finished stays: `RunFolder.making` goes on with it.
    If it was killed between its last two renames, the last one is done now.
    """
    folder = run.folder(name)
    making = named_beside(folder, "making")
    _end_renaming(making, folder)
    unfinished = stage is not None and run.state(stage) != "done"
    for path in (*_beside(folder), *_inside(folder), *_inside(making)):
        if not (unfinished and path == making):
            _remove(path)


def _end_renaming(complete: Path, folder: Path) -> None:
    """Give a folder its place, if it is complete and who has made it was killed when the one before had given way."""
    if (complete / DONE).is_file() and not folder.exists():
        complete.rename(folder)


def _beside(folder: Path) -> list[Path]:
    matched = [(path, WRITTEN_BESIDE.fullmatch(path.name)) for path in folder.parent.glob(f".{folder.name}.*")]
    return [path for path, match in matched if match and match[1] == folder.name]


def _inside(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*.tmp") if WRITTEN_BESIDE.fullmatch(path.name)]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
