"""What trainings of different lengths have in common: while the learning rate stays at its peak (schedule constant, and
wsd before its decay), a longer training takes the very steps of a shorter one. So the steps they share, the trunk, are
made once: one training with a constant rate serves every point at which models branch from it.

A checkpoint on the trunk carries the trunk's hash, which leaves out how long the training is and how it ends; it is
gone on with wherever that hash is the same.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from btx.errors import DataError, RunFolderError
from btx.files import atomic_folder, link_or_copy, read_json
from btx.process import Log
from btx.recipe.training import Training
from btx.system_errors import blame
from btx.training.checkpoint_files import STATE, check_parts, complete_in
from btx.training.schedule import steps_before_decay

SECTIONS = ("train", "finetune")
"""Where the settings of a stage that trains hold its training; those of the seed model have it in `seed_model`."""
OF_ITS_END = ("tokens", "schedule", "decay_share", "decay_shape", "final_learning_rate_share")
"""What decides how long a training is and how it ends, and nothing before its decay."""
STATE_FOLDER, METRICS = "state", "metrics.jsonl"


def trunk_settings(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """A stage's settings without what decides its end; None where the rate falls from the start, or nothing trains."""
    where = settings.get("seed_model", settings)
    section = next((name for name in SECTIONS if isinstance(where.get(name), dict)), None)
    if section is None or where[section].get("schedule") not in ("constant", "wsd"):
        return None
    training = {name: value for name, value in where[section].items() if name not in OF_ITS_END}
    if where is settings:
        return {**settings, section: training}
    return {**settings, "seed_model": {**where, section: training}}


def trunk_steps(shown: Mapping[str, Any]) -> int:
    """Steps of a stage that are on its trunk.

    Args:
        shown: the stage's settings with all defaults filled in.
    """
    return steps_before_decay(all_steps(shown), _training(shown))


def all_steps(shown: Mapping[str, Any]) -> int:
    """Steps of a stage; `shown` as for `trunk_steps`."""
    return _training(shown).steps(shown["sequence_length"])


def _training(shown: Mapping[str, Any]) -> Training:
    where = shown.get("seed_model", shown)
    section = next(where[name] for name in SECTIONS if isinstance(where.get(name), dict))
    return Training.model_validate({name: section[name] for name in Training.model_fields if name in section})


def take_trunk(trunk: str, at_most: int, folder: Path, donors: Sequence[Path], log: Log) -> bool:
    """Put the furthest checkpoint of a trunk into a stage's folder that has none as far, so that its training goes on
    from there.

    Args:
        trunk: hash of the trunk (`Stage.trunk`).
        at_most: steps of the stage that are on it.
        folder: the stage's folder.
        donors: folders of the same stage, elsewhere; they stay as they are.
        log: told which one it goes on from, and which are passed over: damaged, or removed meanwhile by a training that
            is under way.

    Returns:
        Whether there was one.
    """
    passed_over: set[Path] = set()
    while further := [found for found in _further(trunk, furthest_step(folder), at_most, donors)
                      if found[1] not in passed_over]:  # fmt: skip
        step, checkpoint = further[0]
        if problem := _take(checkpoint, folder):
            log(f"{folder.name}: does not go on from step {step} of {checkpoint.parent.parent}: {problem}")
            passed_over.add(checkpoint)
            continue  # and looks again: who has removed this one has left a later one
        log(f"{folder.name}: goes on from step {step} of {checkpoint.parent.parent}, which is the same training until "
            f"there")  # fmt: skip
        return True
    return False


def folders_of(run: Path, stage: str) -> list[Path]:
    """Where checkpoints of a run's stage may lie: in its folder, and in those that were set aside, the latest first."""
    return [run / stage, *sorted(run.glob(f"stale/*/{stage}"), reverse=True)]


def furthest_on_trunk(trunk: str, at_most: int, donors: Sequence[Path]) -> int:
    """Step of the furthest checkpoint on a trunk in stages' folders; 0 if there is none. Arguments as for
    `take_trunk`."""
    return max((step for step, _ in _further(trunk, 0, at_most, donors)), default=0)


def furthest_step(folder: Path) -> int:
    """Step of a stage's furthest checkpoint, on a trunk or not; 0 if it has none."""
    names = (checkpoint.name for checkpoint in (folder / STATE_FOLDER).glob("step-*"))
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def _further(trunk: str, than: int, at_most: int, donors: Sequence[Path]) -> list[tuple[int, Path]]:
    """Checkpoints on a trunk behind step `than`, with their steps, the furthest first."""
    checkpoints = {(step, checkpoint) for donor in donors for step, checkpoint in checkpoints_on_trunk(donor, trunk)
                   if than < step <= at_most}  # fmt: skip
    return sorted(checkpoints, reverse=True)


def _take(checkpoint: Path, folder: Path) -> str:
    """Put a checkpoint and the metrics until there into a stage's folder, if what arrives is whole: its owner may be
    just removing it. Returns what is wrong with it, and has put nothing there then; empty if it is whole.

    Raises:
        RunFolderError: the stage's folder cannot be written.
    """
    donor = checkpoint.parent.parent
    try:
        with atomic_folder(folder / STATE_FOLDER / checkpoint.name) as beside:
            link_or_copy(checkpoint, beside)
            if problem := _damage(beside, checkpoint.name):
                raise DataError(problem.replace(str(beside), str(checkpoint)))
            if (donor / METRICS).is_file():
                shutil.copy2(donor / METRICS, folder / METRICS)
    except DataError as error:
        return _or_removed(checkpoint, str(error))
    except OSError as error:
        blame(error)
        if donor not in Path(error.filename or "").parents:
            raise
        return _or_removed(checkpoint, str(error))
    return ""


def _or_removed(checkpoint: Path, problem: str) -> str:
    return problem if checkpoint.exists() else "it was removed meanwhile"


def checkpoints_on_trunk(donor: Path, trunk: str) -> list[tuple[int, Path]]:
    """Checkpoints of a stage's folder that lie on a trunk, with their steps."""
    checkpoints = []
    for checkpoint in _there(donor / STATE_FOLDER, "step-*"):
        for state in (*_there(checkpoint, STATE), *_there(checkpoint, f"part-*-of-*/{STATE}")):
            facts: dict[str, Any] = {}
            with contextlib.suppress(RunFolderError):  # a broken one is no checkpoint to go on from
                facts = read_json(state) or {}
            if facts.get("trunk") == trunk:
                checkpoints.append((int(facts["step"]), checkpoint))
    return checkpoints


def _there(folder: Path, pattern: str) -> list[Path]:
    """What matches a pattern in a folder; nothing where its owner is just removing it."""
    try:
        return sorted(folder.glob(pattern))
    except FileNotFoundError:
        return []


def _damage(checkpoint: Path, name: str) -> str:
    """What of a checkpoint called `name` is missing, or not as it was written; empty if all is whole."""
    counts = complete_in(checkpoint)
    try:
        for count in counts:
            check_parts(checkpoint, count, name=name)
    except RunFolderError as error:
        return str(error)
    return "" if counts else f"{checkpoint}: not every process has written its part"
