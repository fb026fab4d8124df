"""The stages of a run, what each depends on, and the hash of everything that decides its result. Plain Python.

A stage's hash covers its own settings, what the files it reads hold, and the hashes of the stages before it. So it is
known before anything runs, two different recipes never share a result, and what changes makes exactly those stages
stale that read it. Where files lie, what they are called and when they were written is in no hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from btx.choices.baselines import BASELINES, BTM, UPCYCLED, stage_names
from btx.errors import UserError
from btx.files import value_hash
from btx.recipe.launch import trains
from btx.recipe.schema import Recipe
from btx.run_folder.decisive import as_it_was, decisive, shown
from btx.run_folder.trunk import trunk_settings

Settings = dict[str, Any]
Recorded = Callable[[str], Mapping[str, Any] | None]
"""Stage's name → its started.json where the stage is finished (or begun, where that is asked for), else None."""


def nothing_recorded(stage: str) -> None:
    """For a recipe without a run folder."""


@dataclass(frozen=True, eq=False)
class Stage:
    """One node of the graph. `name` is also its folder in the run folder."""

    name: str
    describe: Callable[[], Settings]
    """Makes everything that decides the result, recipe sections in it as they are: called when it is first asked for,
    because files may have to be read. Raises UserError if they are not here."""
    needs: tuple[Stage, ...] = ()
    files: Callable[[], dict[str, str]] = dict
    """Path of each file the stage reads → its SHA-256: to name the one that changed, no part of the hash."""
    known_as: Callable[[], str] | None = None
    """Makes the name under which the stages that need it know it, where that is another one."""
    recorded: Mapping[str, Any] | None = None
    """started.json of the finished stage: what its files held if they cannot be seen from here."""
    begun: Mapping[str, Any] | None = None
    """started.json of the stage, finished or not: what was neutral when it was begun."""

    @cached_property
    def settings(self) -> Settings:
        """Everything that decides the result besides the stages before it, as it goes into the hash.

        Raises:
            UserError: a file it reads is not here, and the stage is not finished.
        """
        return self._told[0]

    @property
    def shown(self) -> Settings:
        """The settings with all defaults filled in, for people; raises as `settings`."""
        return self._told[1]

    @cached_property
    def _told(self) -> tuple[Settings, Settings]:
        try:
            described = self.describe()
        except UserError:
            if self.recorded is None:
                raise
            return dict(self.recorded["settings"]), dict(self.recorded["shown"])
        now = shown(described)
        return as_it_was(decisive(described), now, self.begun), now

    @cached_property
    def inputs(self) -> str:
        """Hash of the settings and of everything upstream; raises as `settings`."""
        return inputs_hash(self.settings, self.upstream)

    @cached_property
    def trunk(self) -> str | None:
        """Hash of the training without its length and its end, where longer ones begin alike (`btx.run_folder.trunk`);
        raises as `settings`."""
        settings = trunk_settings(self.settings)
        return None if settings is None else inputs_hash(settings, self.upstream)

    @cached_property
    def label(self) -> str:
        """The stage's name in the hashes of those that need it: a domain that was renamed keeps its first one."""
        return self.known_as() if self.known_as is not None else self.name

    @property
    def upstream(self) -> dict[str, str]:
        """Hashes of the stages this one needs, by their labels."""
        return {stage.label: stage.inputs for stage in self.needs}

    @property
    def trains(self) -> bool:
        """True for the stages that run the training loop."""
        return trains(self.name)

    @property
    def is_tracked(self) -> bool:
        """True for the stages that `track` is told of."""
        return self.trains or self.name == "evaluate"

    @property
    def computes(self) -> bool:
        """True for the stages whose FLOPs count: those that train, and the mix, which may compute routers from text."""
        return self.trains or self.name == "mix"

    def training_behind(self) -> list[Stage]:
        """The stages that compute, from the seed model (itself not counted) up to this one, in an order that runs."""
        behind: dict[str, Stage] = {}
        for needed in self.needs:
            behind |= {stage.name: stage for stage in needed.training_behind() if stage.name != "seed"}
        if self.computes:
            behind[self.name] = self
        return list(behind.values())


@dataclass(frozen=True)
class Graph:
    """All stages of a recipe in an order in which they can run."""

    recipe: Recipe
    stages: tuple[Stage, ...]

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def named(self, names: Sequence[str], *, where: str) -> list[Stage]:
        """The stages with these names; a group's name (`groups`) stands for all in it.

        Args:
            where: the run, for the message.

        Raises:
            UserError: no such stage.
        """
        known = {stage.name: [stage] for stage in self} | self.groups
        for name in names:
            if name not in known:
                raise UserError(f"{where}: the recipe has no stage {name!r}; there are: {', '.join(known)}")
        return [stage for name in names for stage in known[name]]

    @property
    def groups(self) -> dict[str, list[Stage]]:
        """Name that stands for several stages, or for the tokenizer's → these; a recipe may have none of some."""
        return {"tokenizer": self.data[:1], "data": self.data, "train": self.branches, "align": self.aligned,
                "baselines": self.baselines}  # fmt: skip

    @property
    def data(self) -> list[Stage]:
        """The tokenizer's stage, then one for each domain."""
        return [stage for stage in self.stages if stage.name.startswith("data/")]

    @property
    def known_as(self) -> dict[str, str]:
        """Domain → the name under which the run's models have read it."""
        prefix = "data/"
        return {stage.name.removeprefix(prefix): stage.label.removeprefix(prefix) for stage in self.data[1:]}

    @property
    def branches(self) -> list[Stage]:
        """The experts' training stages."""
        return [stage for stage in self.stages if stage.name.startswith("train/")]

    @property
    def aligned(self) -> list[Stage]:
        """The stages of SFT and DPO, in the order in which they train."""
        return [stage for stage in self.stages if stage.name.startswith("align/")]

    @property
    def baselines(self) -> list[Stage]:
        """The stages of all baselines."""
        return [stage for stage in self.stages if stage.name.startswith("baselines/")]

    def jobs(self) -> list[tuple[Stage, ...]]:
        """Stages grouped into processes: short stages share one where they need the same resources, every branch and
        trained baseline has its own."""
        soup = [stage for stage in self.baselines if stage.name == "baselines/soup"]
        jobs = [
            *[(stage,) for stage in self.data],
            (self["seed"],),
            *[(branch,) for branch in self.branches],
            (self["mix"], *soup, self["finetune"], *self.aligned),
            *self.baseline_jobs(),
            (self["evaluate"], self["analyze"], self["report"]),
        ]
        return [part for job in jobs for part in self._by_resources(job)]

    def _by_resources(self, job: tuple[Stage, ...]) -> list[tuple[Stage, ...]]:
        """A job, cut where its stages need other processes, machines or settings of the launcher."""
        launch = self.recipe.launch
        return [tuple(part) for _, part in groupby(job, key=lambda stage: launch.resources_of(stage.name))]

    def baseline_stages(self, names: list[str] | None = None) -> list[Stage]:
        """The stages of some baselines, what they share included.

        Raises:
            UserError: the recipe has no such baseline.
        """
        wanted = set()
        for name in names or self.recipe.baselines:
            if name not in self.recipe.baselines:
                there = ", ".join(self.recipe.baselines) or "none"
                raise UserError(f"the recipe has no baseline {name!r}; its `baselines` are: {there}")
            last = self[f"baselines/{name}"]
            wanted |= {last.name, *(stage.name for stage in (*last.needs, *(n for s in last.needs for n in s.needs)))}
        return [stage for stage in self.baselines if stage.name in wanted]

    def baseline_jobs(self) -> list[tuple[Stage, ...]]:
        """Processes of the baselines, but for the soup, which is short. What baselines share is made by the first."""
        known = {stage.name: stage for stage in self.baselines}
        jobs = []
        for name in self.recipe.baselines:
            if BASELINES[name].trains:
                shared = known.pop(f"baselines/{UPCYCLED}", None) if BASELINES[name].start == "upcycled" else None
                jobs.append((*([shared] if shared else []), *[known[stage] for stage in stage_names(name)]))
        btm = tuple(known[f"baselines/{name}"] for name in self.recipe.baselines if name in BTM)
        return [*jobs, *([btm] if btm else [])]


def inputs_hash(settings: Settings, upstream: Mapping[str, str]) -> str:
    """The hash by which a stage is known.

    Args:
        upstream: label of every stage it needs → that stage's hash.
    """
    return value_hash({"settings": settings, "upstream": dict(upstream)})
