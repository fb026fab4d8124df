"""Recipe section: how jobs are started, on how many processes and machines. Plain Python."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, Field, model_validator

from btx.choices.baselines import is_trained
from btx.recipe.section import LauncherName, PositiveFloat, PositiveInt, Section

StageKind = Literal["data", "seed", "train", "mix", "finetune", "align", "baselines", "evaluate", "analyze", "report"]
"""First part of a stage's name: what a setting for some stages is given by."""
SharedKind = Literal["seed", "train", "finetune", "align", "baselines"]
"""Stages whose model several processes can train together."""
OURS = ("output", "error", "input", "job-name", "open-mode", "dependency", "kill-on-invalid-dep", "requeue",
        "no-requeue", "signal", "nodes", "ntasks", "ntasks-per-node", "array", "wrap", "parsable", "chdir", "clusters",
        "test-only", "wait", "account", "partition", "gres", "time")  # fmt: skip
"""Options of sbatch that btx gives itself, by other fields of the recipe or because it depends on them."""


def _is_an_option(text: str) -> str:
    """Refuse what sbatch would take for something else, and what would not be btx's job any more."""
    matched = re.fullmatch(r"--([a-z][a-z-]*)(=[^\n\r\0]*)?", text)
    if matched is None:
        raise ValueError("an option of sbatch is one text, `--NAME` or `--NAME=VALUE`: write `--mem=8G`")
    if any(name.startswith(matched[1]) for name in OURS):  # sbatch takes beginnings of names too
        raise ValueError(f"--{matched[1]} is what btx gives sbatch itself; fields of the recipe say what can be chosen")
    return text


def _text_like(pattern: str, what: str) -> AfterValidator:
    """Refuse text that does not match `pattern` as a whole; `what` says in words what would."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{what}, got {text!r}")
        return text

    return AfterValidator(check)


SlurmWord = Annotated[str, _text_like(r"[A-Za-z0-9_.,:=@/*()\[\]-]*", "letters, digits and _.,:=@/*()[]- only")]
SlurmTime = Annotated[str, _text_like(
    r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}", "minutes, hours:minutes:seconds or days-hours"
)]  # fmt: skip
RayAddress = Annotated[str, _text_like(
    r"https?://[^/\s]+/?", "the address of a Ray cluster's job server, as http://head:8265"
)]  # fmt: skip
ShellLine = Annotated[str, _text_like(
    r"[^\n\r\0]*", "a line of bash has no line break; give each line an entry of its own"
)]  # fmt: skip
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


class RayJob(Section):
    """What a job claims of a Ray cluster: it starts on a node that has it free."""

    cpus: PositiveFloat | None = None
    """CPUs each of its processes claims; default: `launch.threads`, or 1."""
    gpus: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    """GPUs each of its processes claims; default: none. Jobs that prepare data claim none."""
    resources: dict[str, PositiveFloat] | None = None
    """What it claims of the cluster's own resources, by their names."""


class Ray(RayJob):
    """Jobs of a Ray cluster."""

    address: RayAddress | None = None
    """The cluster's job server, `http://head:8265` for example; default: a Ray of this machine, which ends with
    `btx run`."""
    stages: dict[StageKind, RayJob] = {}
    """Stage kind → what its jobs claim otherwise; what it leaves out is as for the others."""


Job = TypeVar("Job", SlurmJob, RayJob)


class Launch(Section):
    """How jobs are started. It decides no result but for rounding, so it may change between two `btx run`."""

    kind: LauncherName = "local"
    """Launcher; `btx ls launchers` explains them."""
    jobs: PositiveInt | None = None
    """Jobs (branches, finetuning, baselines) trained at the same time on one machine; default: as many as there are
    branches, on a machine with GPUs one a GPU (with `processes`, as many as its GPUs hold). More than that share GPUs.
    How many run at once on a cluster is its queue's affair."""
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
    ray: Ray = Ray()
    """With `kind: ray`."""
    hung_after_s: PositiveInt | None = 3600
    """Seconds without progress after which a job is taken to hang: it is asked to save, then ended, and has failed.
    More than the longest step, batch of an evaluation or loading of a model takes; null waits for ever."""
    weights_per_device: PositiveInt | None = None
    """Bytes of weights that a GPU (on a machine without one: the CPU) is given at most where models are measured and
    routers fitted; what is above goes to the next GPU, to host memory, to disk, the last two slowly. Default: as much
    as fits."""

    @model_validator(mode="after")
    def _machines_have_as_many_processes_each(self) -> Launch:
        for kind in get_args(SharedKind):
            count, nodes = self.processes_of(kind), self.nodes_of(kind)
            if count % nodes:
                raise ValueError(
                    f"launch.nodes is {nodes} for {kind}, and its launch.processes, {count}, cannot be spread over as "
                    f"many machines equally; launch.processes counts those of all machines: a multiple of {nodes}"
                )
        return self

    def processes_of(self, stage: str) -> int:
        """Processes that train the model of a stage together, over all nodes."""
        return _of_kind(self.processes, stage)

    def gpus_of(self, stages: Iterable[str]) -> int:
        """GPUs that a job has to itself where there are some: one a process of its stages that train, and for the mix,
        which may fit routers beside baselines that train, as many as for the finetuning; 0: it sees all."""
        named = ["finetune" if stage == "mix" else stage for stage in stages]
        return max((self.processes_of(stage) for stage in named if trains(stage)), default=0)

    def nodes_of(self, stage: str) -> int:
        """Machines they are spread over; a number is for the stages that `processes`, where it names some, names."""
        if isinstance(self.nodes, int) and isinstance(self.processes, dict) and self.processes_of(stage) == 1:
            return 1
        return _of_kind(self.nodes, stage)

    def slurm_of(self, stage: str) -> SlurmJob:
        """What the job of a stage asks of Slurm."""
        general = self.slurm if _kind(stage) != "data" else self.slurm.model_copy(update={"gres": None})
        return _otherwise(general, self.slurm.stages, stage, SlurmJob)

    def ray_of(self, stage: str) -> RayJob:
        """What the job of a stage claims of Ray."""
        general = self.ray if _kind(stage) != "data" else self.ray.model_copy(update={"gpus": None})
        return _otherwise(general, self.ray.stages, stage, RayJob)

    def resources_of(self, stage: str) -> tuple[object, ...]:
        """What a stage's job needs: stages that need the same can be done by one job."""
        engine = {"slurm": self.slurm_of, "ray": self.ray_of}.get(self.kind, lambda stage: None)(stage)
        return self.processes_of(stage), self.nodes_of(stage), engine


def _kind(stage: str) -> str:
    return stage.split("/")[0]


def _otherwise(general: Job, stages: Mapping[Any, Job], stage: str, job: type[Job]) -> Job:
    """What a stage's kind says, and where it says nothing, what is said for all."""
    special = stages.get(_kind(stage), job())
    return job.model_construct(**{
        field: getattr(special, field) if getattr(special, field) is not None else getattr(general, field)
        for field in job.model_fields
    })  # fmt: skip


def _of_kind(setting: int | Mapping[Any, int], stage: str) -> int:
    if not trains(stage):
        return 1
    return setting if isinstance(setting, int) else setting.get(_kind(stage), 1)


def trains(stage: str) -> bool:
    """Whether the stage of this name, or of this kind, runs the training loop, and so saves as it goes."""
    if stage.startswith("baselines/"):  # a soup is made by one process
        return is_trained(stage)
    return _kind(stage) in get_args(SharedKind)
