"""Recipe section: how jobs are started, on how many processes and machines. Plain Python."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from btx.recipe.section import LauncherName, PositiveInt, Section

StageKind = Literal["data", "seed", "train", "mix", "finetune", "baselines", "evaluate", "analyze", "report"]
"""First part of a stage's name: what a setting for some stages is given by."""
SharedKind = Literal["seed", "train", "finetune", "baselines"]
"""Stages whose model several processes can train together."""
OURS = ("output", "error", "input", "job-name", "open-mode", "dependency", "kill-on-invalid-dep", "requeue",
        "no-requeue", "signal", "nodes", "ntasks", "ntasks-per-node", "array", "wrap", "parsable", "chdir", "clusters",
        "test-only", "wait", "account", "partition", "gres", "time")  # fmt: skip
"""Options of sbatch that btx gives itself, by other fields of the recipe or because it depends on them."""


def _is_an_option(text: str) -> str:
    """Refuse what sbatch would take for something else, and what would not be btx's job any more."""
    found = re.fullmatch(r"--([a-z][a-z-]*)(=[^\n\r\0]*)?", text)
    if found is None:
        raise ValueError("an option of sbatch is one text, `--NAME` or `--NAME=VALUE`: write `--mem=8G`")
    if found[1] in OURS:
        raise ValueError(f"--{found[1]} is what btx gives sbatch itself; launch.slurm and launch have fields for what "
                         f"can be chosen")  # fmt: skip
    return text


def _is_one_line(text: str) -> str:
    if "\n" in text or "\r" in text or "\0" in text:
        raise ValueError("a line of bash has no line break; give each line an entry of its own")
    return text


SlurmWord = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:=@/*()\[\]-]*$")]
SlurmTime = Annotated[str, Field(pattern=r"^(\d+|\d+:\d{2}|\d+:\d{2}:\d{2}|\d+-\d+(:\d{2}){0,2})$")]
ShellLine = Annotated[str, AfterValidator(_is_one_line)]
SlurmOption = Annotated[str, AfterValidator(_is_an_option)]


class SlurmJob(Section):
    """What a job asks of Slurm."""

    account: SlurmWord | None = None
    """Whose hours it takes (`sbatch --account`)."""
    partition: SlurmWord | None = None
    """Queue, or several with commas (`sbatch --partition`)."""
    gres: SlurmWord | None = None
    """What it needs of each node, `gpu:4` for example (`sbatch --gres`); jobs that prepare data ask for none."""
    time: SlurmTime | None = None
    """Longest time a job may run at once, as `sbatch --time` has it: "90" (minutes), "12:00:00", "2-00:00:00"; in
    quotes where it is a number. What trains saves before it is over, and goes on after it in a new turn."""
    setup: list[ShellLine] | None = None
    """Lines of bash before the job's own, in the run's working directory: `module load cuda`, for example."""
    options: list[SlurmOption] | None = None
    """Further options of sbatch, each as one text: `--constraint=a100`, `--mem=0`, `--qos=long`."""


class Slurm(SlurmJob):
    """Jobs of a Slurm cluster."""

    grace_s: PositiveInt = 120
    """Seconds before its time limit at which a job that trains is told to save; Slurm may tell it a minute sooner. How
    long a job that is preempted may take is the partition's GraceTime."""
    stages: dict[StageKind, SlurmJob] = {}
    """Stage kind → what its jobs ask for otherwise; what it leaves out is as for the others, and `gres: ""` none."""


class Launch(Section):
    """How jobs are started. It decides no result but for rounding, so it may change between two `btx run`."""

    kind: LauncherName = "local"
    """Launcher; `btx ls launchers` explains them."""
    jobs: PositiveInt | None = None
    """Jobs (branches, finetuning, baselines) trained at the same time on one machine; default: as many as there are
    branches. How many run at once on a cluster is its queue's affair."""
    threads: PositiveInt | None = None
    """CPU threads a job; default: the processors shared among the jobs, at least one each; on a cluster those that the
    job was given."""
    processes: PositiveInt | dict[SharedKind, PositiveInt] = 1
    """Processes that train one model together, over all nodes, each with a share of its weights and of every batch: a
    number for all training stages, or stage kind → number. On GPUs one process a GPU."""
    nodes: PositiveInt | dict[SharedKind, PositiveInt] = 1
    """Machines that the processes of one model are spread over, as many on each; more than one needs a launcher that
    gives out machines."""
    retries: Annotated[int, Field(ge=0)] = 0
    """Times a job that failed is started again before the run gives it up; the others go on meanwhile. What the user
    has to mend is not tried again."""
    slurm: Slurm = Slurm()
    """With `kind: slurm`."""

    hung_after_s: PositiveInt | None = 3600
    """Seconds without progress after which a job is taken to hang: it is asked to save, then ended, and has failed.
    More than the longest step, batch of an evaluation or loading of a model takes; null waits for ever."""

    def processes_of(self, stage: str) -> int:
        """Processes that train the model of a stage together, over all nodes."""
        return _of_kind(self.processes, stage)

    def nodes_of(self, stage: str) -> int:
        """Machines they are spread over."""
        return _of_kind(self.nodes, stage)

    def slurm_of(self, stage: str) -> SlurmJob:
        """What the job of a stage asks of Slurm."""
        kind = stage.split("/")[0]
        general = self.slurm if kind != "data" else self.slurm.model_copy(update={"gres": None})
        special = {str(name): job for name, job in self.slurm.stages.items()}.get(kind, SlurmJob())
        return SlurmJob.model_construct(**{
            field: getattr(special, field) if getattr(special, field) is not None else getattr(general, field)
            for field in SlurmJob.model_fields
        })  # fmt: skip

    def resources_of(self, stage: str) -> tuple[object, ...]:
        """What a stage's job needs: stages that need the same can be done by one job."""
        engine = self.slurm_of(stage) if self.kind == "slurm" else None
        return self.processes_of(stage), self.nodes_of(stage), engine


def _of_kind(setting: int | dict[SharedKind, int], stage: str) -> int:
    kind = stage.split("/")[0]
    if kind not in SharedKind.__args__:  # type: ignore[attr-defined]
        return 1
    return setting if isinstance(setting, int) else {str(name): count for name, count in setting.items()}.get(kind, 1)
