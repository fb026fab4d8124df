"""Recipe section: how jobs are started, on how many processes and machines. Plain Python."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from btx.recipe.section import LauncherName, PositiveInt, Section

StageKind = Literal["data", "seed", "train", "mix", "finetune", "baselines", "evaluate", "analyze", "report"]
"""First part of a stage's name: what a setting for some stages is given by."""
SharedKind = Literal["seed", "train", "finetune", "baselines"]
"""Stages whose model several processes can train together."""


class Launch(Section):
    """How jobs are started. It decides no result but for rounding, so it may change between two `btx run`."""

    kind: LauncherName = "local"
    """Launcher; `btx ls launchers` explains them."""
    jobs: PositiveInt | None = None
    """Jobs (branches, finetuning, baselines) trained at the same time; default: as many as there are branches."""
    threads: PositiveInt | None = None
    """CPU threads a job; default: the processors shared among the jobs, at least one each."""
    processes: PositiveInt | dict[SharedKind, PositiveInt] = 1
    """Processes that train one model together, over all nodes, each with a share of its weights and of every batch: a
    number for all training stages, or stage kind → number. On GPUs one process a GPU."""
    nodes: PositiveInt | dict[SharedKind, PositiveInt] = 1
    """Machines that the processes of one model are spread over, as many on each; more than one needs a launcher that
    gives out machines."""
    retries: Annotated[int, Field(ge=0)] = 0
    """Times a job that failed is started again before the run gives it up; the others go on meanwhile. What the user
    has to mend is not tried again."""

    @model_validator(mode="after")
    def _machines_have_as_many_processes_each(self) -> Launch:
        for kind in SharedKind.__args__:  # type: ignore[attr-defined]
            count, nodes = self.processes_of(kind), self.nodes_of(kind)
            if count % nodes:
                raise ValueError(
                    f"launch.nodes is {nodes} for {kind}, and its launch.processes, {count}, cannot be spread over as "
                    f"many machines equally; launch.processes counts those of all machines: a multiple of {nodes}"
                )
            if nodes > 1 and self.kind == "local":
                raise ValueError(
                    f"launch.nodes is {nodes} for {kind}, and launch.kind: local has this machine alone; launch.nodes: "
                    f"1, or a launcher that gives out machines (`btx ls launchers`)"
                )
        return self

    def processes_of(self, stage: str) -> int:
        """Processes that train the model of a stage together, over all nodes."""
        return _of_kind(self.processes, stage)

    def nodes_of(self, stage: str) -> int:
        """Machines they are spread over; a number is for the stages that `processes`, where it names some, names."""
        if isinstance(self.nodes, int) and isinstance(self.processes, dict) and self.processes_of(stage) == 1:
            return 1
        return _of_kind(self.nodes, stage)


def _of_kind(setting: int | dict[SharedKind, int], stage: str) -> int:
    kind = stage.split("/")[0]
    if kind not in SharedKind.__args__:  # type: ignore[attr-defined]
        return 1
    return setting if isinstance(setting, int) else {str(name): count for name, count in setting.items()}.get(kind, 1)
