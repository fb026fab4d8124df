"""The jobs of a recipe as texts need them: each with the jobs it waits for, and in groups that may run side by side."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from btx.errors import NOT_YET
from btx.recipe.loading import dump_recipe
from btx.recipe.schema import Recipe
from btx.run_folder.folder import RunFolder
from btx.running.launchers.job import SAVED, btx_command

MOUNT, VOLUME = "/btx", "btx-runs"
"""Where the file system with the run folder is on an engine's machines, if its path is relative; and its name there."""
RETRIED = [NOT_YET, SAVED]
"""Exit codes after which a job is started again: what it needs is not there yet; it was asked to end, and has saved."""


@dataclass(frozen=True)
class Job:
    """What one `btx work RUN STAGE...` does."""

    stages: tuple[str, ...]
    needs: tuple[str, ...]
    """Names of the jobs that have to end well before it; what these wait for is not repeated."""
    processes: int
    """That train its model together, over all nodes."""
    nodes: int
    """Machines it runs on at once."""

    @property
    def name(self) -> str:
        """That of its first stage."""
        return self.stages[0]

    @property
    def kind(self) -> str:
        """What its settings are given by: data, seed, train, ..."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Group:
    """Jobs alike: of one kind and size, and waiting for the same."""

    name: str
    jobs: tuple[Job, ...]
    needs: tuple[str, ...]
    """Names of the groups that have to end well before it; what these wait for is not repeated."""

    @property
    def kind(self) -> str:
        """That of its jobs."""
        return self.jobs[0].kind

    @property
    def processes_a_node(self) -> int:
        """Processes of one of its jobs on one machine."""
        return self.jobs[0].processes // self.jobs[0].nodes

    @property
    def nodes(self) -> int:
        """Machines that one of its jobs runs on."""
        return self.jobs[0].nodes

    def shares(self, slots: int | None) -> list[tuple[str, ...]]:
        """Stages of the group for each place where they are done at the same time, one after the other there.

        Args:
            slots: places at most; None: one for every job.
        """
        count = min(slots or len(self.jobs), len(self.jobs))
        return [tuple(stage for job in self.jobs[place::count] for stage in job.stages) for place in range(count)]


def dashed(stage: str) -> str:
    """A stage's name without its slash."""
    return stage.replace("/", "-")


def script(template: str, recipe: Recipe, **more: str) -> str:
    """A script to be run here: `@NAME@` replaced by the working directory, the run, btx, the recipe and `more`; what
    these hold is left as it is."""
    values = {
        "CWD": shlex.quote(str(Path.cwd())), "RUN": shlex.quote(recipe.run_folder), "BTX": shlex.join(btx_command()),
        "RECIPE": dump_recipe(recipe).rstrip("\n"), **more,
    }  # fmt: skip
    return re.sub("@([A-Z]+)@", lambda place: values[place[1]], template)


def mount_of(recipe: Recipe) -> str:
    """Where the file system with the run folder is on an engine's machines."""
    run = PurePosixPath(recipe.run_folder)
    return str(run.parent) if run.is_absolute() else MOUNT


def gpus_of(group: Group, recipe: Recipe) -> int:
    """GPUs of one of a group's jobs on one machine: as many as processes, where the recipe says `device: cuda`."""
    return group.processes_a_node if recipe.device == "cuda" and group.kind not in ("data", "report") else 0


def work_text(run: str, shares: Sequence[tuple[str, ...]], place: str) -> str:
    """What is done in each of several places: its share, in the place of the shell, so that signals reach it.

    Args:
        place: what the shell knows the place's number by.
    """
    works = [f"exec btx work {shlex.quote(run)} {' '.join(stages)}" for stages in shares]
    if len(works) == 1:
        return f"{works[0]}\n"
    cases = "".join(f"  {number}) {work} ;;\n" for number, work in enumerate(works))
    return f'case "{place}" in\n{cases}esac\n'


def jobs_of(recipe: Recipe) -> list[Job]:
    """The jobs that `btx run` would start, finished ones too (`btx work` skips these), in an order that runs."""
    jobs = RunFolder(Path(recipe.run_folder), recipe).graph.jobs()
    maker = {stage.name: job[0].name for job in jobs for stage in job}
    behind: dict[str, set[str]] = {}  # all jobs that one waits for
    texts = []
    for job in jobs:
        wanted = dict.fromkeys(maker[needed.name] for stage in job for needed in stage.needs)
        wanted.pop(job[0].name, None)
        needs = tuple(name for name in wanted if not any(name in behind[other] for other in wanted))
        behind[job[0].name] = set(needs).union(*(behind[name] for name in needs))
        texts.append(
            Job(
                stages=tuple(stage.name for stage in job),
                needs=needs,
                processes=max(recipe.launch.processes_of(stage.name) for stage in job),
                nodes=max(recipe.launch.nodes_of(stage.name) for stage in job),
            )
        )
    return texts


def groups_of(jobs: Sequence[Job]) -> list[Group]:
    """Jobs alike together, in an order that runs."""
    group_of: dict[str, Hashable] = {}  # job → what is the same for all of its group
    members: dict[Hashable, list[Job]] = {}
    needs: dict[Hashable, frozenset[Hashable]] = {}
    behind: dict[Hashable, set[Hashable]] = {}  # all groups that one waits for
    for job in jobs:
        wanted = {group_of[needed] for needed in job.needs}
        direct = frozenset(group for group in wanted if not any(group in behind[other] for other in wanted))
        group = group_of[job.name] = (job.kind, job.processes, job.nodes, direct)
        members.setdefault(group, []).append(job)
        needs[group], behind[group] = direct, set(direct).union(*(behind[other] for other in direct))
    names: dict[Hashable, str] = {}
    for each, alike in members.items():  # one is called like its job, several like their kind
        name = dashed(alike[0].name) if len(alike) == 1 else alike[0].kind
        names[each] = unlike(name, names.values())  # the second of a kind has a number
    return [
        Group(names[each], tuple(alike), tuple(names[other] for other in members if other in needs[each]))
        for each, alike in members.items()
    ]


def unlike(name: str, taken: Collection[str], length: int = 100) -> str:
    """The name, with the first number that makes it another one than those that are taken; at most so long."""
    tries = (name[:length], *(f"{name[: length - 3]}-{number}" for number in range(2, len(taken) + 2)))
    return next(one for one in tries if one not in taken)
