"""How many jobs of a run are under way at once, and the CPU threads each stage trains with. Plain Python."""

from __future__ import annotations

import os
import re

from btx.run_folder.graph import Graph, Stage


def threads_of(graph: Graph, stage: Stage) -> int:
    """CPU threads that a stage which trains will have."""
    if shares_processors(graph, stage):
        return training_threads(graph)
    return threads_alone()


def threads_alone() -> int:
    """CPU threads of a stage beside which no other trains: all processors, unless OMP_NUM_THREADS says otherwise. Of
    its several numbers (OpenMP has one for each level of nesting) the first counts, as for torch."""
    asked_for = re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", ""))
    return int(asked_for[1]) if asked_for and int(asked_for[1]) else processors()


def shares_processors(graph: Graph, stage: Stage) -> bool:
    """Whether other jobs may train beside this stage: the seed model trains alone, as do the finetuning and what comes
    after it in a run without trained baselines."""
    if stage.name == "finetune" or stage in graph.aligned:
        return any(job.trains for job in graph.baselines)
    return stage.name != "seed"


def training_threads(graph: Graph) -> int:
    """CPU threads of a job: the recipe's, or the processors shared among the jobs that may train at once; a job of
    Slurm's has those that it was given to itself, one of Ray's those that it claims.

    It depends on the recipe alone, not on what is running, so that a job that is resumed has the same number again.
    """
    launch = graph.recipe.launch
    if launch.kind == "ray":
        return launch.threads or max(1, int(launch.ray.cpus or 1))
    return launch.threads or max(1, processors() // (1 if launch.kind == "slurm" else jobs_at_once(graph)))


def jobs_at_once(graph: Graph, gpus: int = 0) -> int:
    """Jobs under way at the same time, at most: `launch.jobs`, or as many as there are branches, which is what the
    method itself can use, but one on a machine whose processors a job's several processes take, and as many as its GPUs
    hold of those with the fewest processes on one that has some; never more than can be side by side at all.

    Args:
        gpus: of the machine that the jobs share.

    The one answer for all who ask, but that only the pipeline knows the machine's GPUs: it starts no more, their
    processors are shared among so many, `btx plan` adds up the memory of so many. So a job that can never run takes no
    processors from those that do, and a job that is started has its share of processors and memory, a baseline like a
    branch.
    """
    most, launch = max(len(jobs) for jobs in jobs_side_by_side(graph)), graph.recipe.launch
    processes = [launch.processes_of(stage.name) for stage in graph if stage.trains]
    takes_all = launch.kind == "local" and max(processes) > 1
    by_itself = max(1, gpus // min(processes)) if gpus else 1 if takes_all else len(graph.branches)
    return min(launch.jobs or by_itself, most)


def jobs_side_by_side(graph: Graph) -> tuple[list[tuple[Stage, ...]], list[tuple[Stage, ...]]]:
    """The jobs that may be under way together: the branches, with the baselines that wait for none of them; later the
    finetuning, with all baselines."""
    baselines, after = graph.baseline_jobs(), {"mix", *(branch.name for branch in graph.branches)}
    early = [job for job in baselines if not after & {stage.name for stage in job[0].needs}]
    finetuning = next(job for job in graph.jobs() if graph["finetune"] in job)
    return [*((branch,) for branch in graph.branches), *early], [finetuning, *baselines]


def processors() -> int:
    """Processors this process may use: not those that its container, `taskset` or Slurm keeps from it."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(here, int(os.environ.get("SLURM_CPUS_ON_NODE") or here))
