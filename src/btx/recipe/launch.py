"""Recipe section: how jobs are started, on how many processes and machines. Plain Python."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from btx.recipe.section import LauncherName, PositiveFloat, PositiveInt, Section

StageKind = Literal["data", "seed", "train", "mix", "finetune", "baselines", "evaluate", "analyze", "report"]
"""First part of a stage's name: what a setting for some stages is given by."""
SharedKind = Literal["seed", "train", "finetune", "baselines"]
"""Stages whose model several processes can train together."""


class Claims(Section):
    """What a job claims of a Ray cluster; Ray starts it on a node that has it free."""

    cpus: PositiveFloat | None = None
    """CPUs a process reserves; default: `launch.threads`, or 1."""
    gpus: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """GPUs a process reserves; a job sees no others. Jobs that prepare data reserve none unless `stages` says so."""
    resources: dict[str, PositiveFloat] = {}
    """Custom resource of the cluster → how much of it a job reserves."""


class Ray(Claims):
    """Where Ray is, and what jobs claim of it."""

    address: Annotated[str, Field(pattern=r"^https?://[^/\s]+/?$")] | None = None
    """Job server of a cluster, for example http://head:8265; default: a Ray of this machine, for this run alone."""
    stages: dict[StageKind, Claims] = {}
    """Stage kind → what its jobs claim instead; what is left out is as for all."""

    def claims_of(self, stage: str) -> Claims:
        """What a job of a stage claims."""
        kind = stage.split("/")[0]
        shared = self.model_dump(include=set(Claims.model_fields)) | ({"gpus": 0.0} if kind == "data" else {})
        instead = {str(name): claims for name, claims in self.stages.items()}.get(kind, Claims())
        return Claims.model_validate(shared | instead.model_dump(exclude_unset=True))


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
    ray: Ray = Ray()
    """`kind: ray`: jobs of a Ray cluster."""
    retries: Annotated[int, Field(ge=0)] = 0
    """Times a job that failed is started again before the run gives it up; the others go on meanwhile. What the user
    has to mend is not tried again."""

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
