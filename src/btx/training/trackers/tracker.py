"""What a tracker is: a copy of a stage's metrics.jsonl somewhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from btx.files import read_json, write_json

Ending = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Tracked:
    """The stage that is tracked."""

    project: str
    """The recipe's name."""
    run: Path
    """The run folder; its name is that of the group of stages."""
    stage: str
    folder: Path
    """What a tracker keeps of this stage lies here, and is set aside with the stage when that becomes stale."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The stage's settings with all defaults filled in."""

    @property
    def group(self) -> str:
        """Name of what the stages of a run have in common."""
        return self.run.absolute().name

    @property
    def name(self) -> str:
        """Of the stage, among those of all run folders."""
        return f"{self.group}/{self.stage}"

    def kept(self, tracker: str, name: str, make: Callable[[], str], *, anew: bool = False) -> str:
        """By what a tracker knows the stage's run again: as noted in the stage's folder, else made and noted.

        Args:
            anew: make it, whatever is noted.
        """
        file = self.folder / f"{tracker}.json"
        noted: dict[str, str] | None = None if anew else read_json(file, dict[str, str])
        if noted is None or name not in noted:
            write_json(file, noted := {name: make()})
        return noted[name]


class Point(NamedTuple):
    """The numbers of a step."""

    step: int
    time: float
    """When it was done, in seconds since 1970."""
    values: dict[str, float]


class Tracker(Protocol):
    """A place that takes the numbers of a stage. It is used by one thread; what it raises ends the tracking alone.

    The file of each has one as its class `Run`, which is made with a `Tracked`: it imports the package and opens, or
    opens again, what belongs to the stage.
    """

    last_step: int
    """The last step that it has, when it is opened: it gets the steps behind it. 0: all of them."""

    def add(self, points: Sequence[Point]) -> None:
        """Take steps, in their order; they are safe when this returns."""

    def close(self, ending: Ending) -> None:
        """There will be no more of this process."""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted key → value."""
    flattened: dict[str, Any] = {}
    for name, value in values.items():
        flattened |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flattened
