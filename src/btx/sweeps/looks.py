"""A sweep as `btx watch` sees it: one row a run. Plain Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from btx.run_folder.folder import RunFolder
from btx.run_folder.status import at_work, lost_on, owner_of
from btx.running.looks import Look, Row, Watched, WatchedRun
from btx.sweeps.sweep import runs_in


class WatchedSweep:
    """All runs of a sweep's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._runs: dict[Path, WatchedRun] = {}
        self._finished: dict[Path, Row] = {}

    def look(self) -> Look:
        """One row a run; raises as `Watched.look`."""
        runs = runs_in(self.path)
        runner = at_work(self.path, "sweep")
        rows, remarks, under_way, done = [], list[str](), runner is not None, True
        for variant, rng_seed, folder in runs:
            look, row = self._row(f"{variant} {rng_seed}", folder)
            rows.append(row)
            if look is not None:
                remarks += look.remarks
                under_way |= look.is_under_way
                done &= look.is_done
        where = f"btx sweep on {runner}" if runner else "no btx sweep"
        finished = sum(row.state == "done" for row in rows)
        title = f"{self.path}: {finished} of {len(rows)} runs done, {where}"
        failed = [f"{row.name}: {row.note}" for row in rows if row.state == "failed"]
        if runner is None and (killed := owner_of(self.path, "sweep")) is not None:
            failed.append(f"btx sweep: {lost_on(killed[1])}")
        return Look(title, rows, tuple(dict.fromkeys(remarks)), under_way, done and runner is None, failed)

    def _row(self, name: str, folder: Path) -> tuple[Look | None, Row]:
        """A run's row, and its look if it is not finished; a finished one is looked at no more."""
        if folder in self._finished:
            return None, self._finished[folder]
        if not (folder / "recipe.yaml").is_file():
            return Look("", (), is_done=False), Row(name, "absent")
        look = self._runs.setdefault(folder, WatchedRun(folder)).look()
        row = _summary(name, look)
        if look.is_done:
            self._finished[folder] = row
        return look, row


def _summary(name: str, look: Look) -> Row:
    """A run in a row: what it is at, with the numbers of the first training under way."""
    at_work = [row for row in look.rows if row.state in ("running", "begun")]
    queued = [row for row in look.rows if row.state == "queued"]
    done = f"{sum(row.state == 'done' for row in look.rows)} of {len(look.rows)} stages done"
    if look.is_done:
        return Row(name, "done", done)
    if look.failed and not look.is_under_way:
        return Row(name, "failed", "; ".join(look.failed))
    first = next((row for row in at_work if row.step is not None), None)
    state = "running" if look.is_under_way and at_work else "queued" if queued else "begun"
    note = ", ".join([*(row.name for row in at_work), done])
    if first is None:
        return Row(name, state, note)
    spikes, skipped = sum(row.spikes for row in at_work), sum(row.skipped for row in at_work)
    return replace(first, name=name, state=state, note=note, spikes=spikes, skipped=skipped)


def watched_in(path: Path) -> Watched | None:
    """The run or sweep in a folder; None where one may still appear.

    Raises:
        RunFolderError: the folder holds something else.
    """
    if (path / "sweep.json").is_file():
        return WatchedSweep(path)
    if (path / "recipe.yaml").is_file():
        return WatchedRun(path)
    try:
        others = [file.name for file in path.iterdir() if file.name[0] != "."]  # locks, a recipe that is being written
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        others = [path.name]
    if others:
        RunFolder.open(path)  # says what is missing
    return None
