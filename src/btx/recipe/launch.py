"""Recipe section: how jobs are started, on how many processes and machines. Plain Python."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

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

    weights_per_device: PositiveInt | None = None
    """Bytes of weights that a GPU (on a machine without one: the CPU) is given at most where models are measured and
    routers fitted; what is above goes to the next GPU, to host memory, to disk, the last two slowly. Default: as much
    as fits."""

    def processes_of(self, stage: str) -> int:
        """Processes that train the model of a stage together, over all nodes."""
        return _of_kind(self.processes, stage)

    def nodes_of(self, stage: str) -> int:
        """Machines they are spread over."""
        return _of_kind(self.nodes, stage)


def _of_kind(setting: int | dict[SharedKind, int], stage: str) -> int:
    kind = stage.split("/")[0]
    if kind not in SharedKind.__args__:  # type: ignore[attr-defined]
        return 1
    return setting if isinstance(setting, int) else {str(name): count for name, count in setting.items()}.get(kind, 1)
