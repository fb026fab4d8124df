"""How many CPU threads each stage trains with. Plain Python."""

from __future__ import annotations

import os

from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage


def threads_of(run: RunFolder, stage: Stage) -> int:
    """CPU threads that a stage which trains will have."""
    if shares_processors(run, stage):
        return training_threads(run)
    return int(os.environ.get("OMP_NUM_THREADS") or processors())


def shares_processors(run: RunFolder, stage: Stage) -> bool:
    """Whether other jobs may train beside this stage: the seed model trains alone, as does the finetuning in a run
    without trained baselines."""
    return stage.name != "seed" and (stage.name != "finetune" or any(job.trains for job in run.graph.baselines))


def training_threads(run: RunFolder) -> int:
    """CPU threads of a job: the recipe's, or the processors shared among the jobs that may train at once.

    It depends on the recipe alone, not on what is running, so that a job that is resumed has the same number again.
    """
    launch = run.recipe.launch
    return launch.threads or max(1, processors() // jobs_at_once(run))


def jobs_at_once(run: RunFolder) -> int:
    """Training jobs that may run side by side: `launch.jobs`, or as many as there are branches; never more than there
    are."""
    branches, baselines = run.graph.branches, run.graph.baseline_jobs()
    trained = [job for job in baselines if job[-1].trains]
    beside_branches = [job for job in trained if not any(stage.name == "mix" for stage in job[0].needs)]
    most = max(len(branches) + len(beside_branches), 1 + len(trained))
    return min(run.recipe.launch.jobs or len(branches), most)


def processors() -> int:
    """Processors this process may use: not those that its container or `taskset` keeps from it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
