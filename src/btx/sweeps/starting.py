"""What a sweep is checked by before anything is written, and how its runs are started on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from btx.errors import UserError
from btx.run_folder.finished_models import model_stages
from btx.run_folder.threads import processors
from btx.running.gpus import Gpus, gpus_of
from btx.running.launchers.local import LocalProcess, start_run
from btx.sweeps.sweep import Start
from btx.sweeps.variants import SweepPlan, SweepRun


def starter(jobs: int) -> Start:
    """Starts runs in processes of their own; with several at a time, they share the processors and the GPUs."""
    threads = {"OMP_NUM_THREADS": str(max(1, processors() // jobs))} if jobs > 1 else {}
    gpus, started = Gpus([]), list[LocalProcess]()

    def start(run: SweepRun, output: Path) -> LocalProcess:
        here = jobs > 1 and run.recipe.launch.kind == "local"  # an engine's jobs are elsewhere, with GPUs of their own
        gpus.names = gpus_of(run.recipe.device) if here else ()
        for process in [process for process in started if process.exit_code() is not None]:
            gpus.give_back(process.pid)
            started.remove(process)
        own = gpus.variables(max(1, len(gpus.names) // jobs))
        started.append(process := start_run(run.folder, output, threads | own))
        gpus.take(process.pid, own)
        return process

    return start


def check_plans(planned: SweepPlan) -> dict[str, dict[str, Any]]:
    """What every variant costs (`btx.planning.plan`); refuses variants whose models cannot be built, and models that no
    variant makes.

    Raises:
        UserError: names the variant.
    """
    from btx.planning.plan import plan

    plans, problems, models = {}, [], list[str]()
    for run in planned.runs:
        if run.rng_seed != planned.rng_seeds[0]:
            continue
        try:
            plans[run.variant.label] = plan(run.recipe)
            models += model_stages(run.recipe)
        except UserError as error:
            problems.append(f"variant {run.variant.label}: {error}")
    problems += [f"--models: no variant has a model {name!r}; there are: {', '.join(dict.fromkeys(models))}"
                 for name in planned.models or () if models and name not in models]  # fmt: skip
    if problems:
        raise UserError("\n".join(problems))
    return plans
