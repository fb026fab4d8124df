"""The run as Slurm batch scripts, and the script that submits them in order (https://slurm.schedmd.com/sbatch.html)."""

from __future__ import annotations

from pathlib import Path

from btx.recipe.schema import Recipe
from btx.run_folder.jobs import log_of
from btx.running.launch_texts.jobs import Job, dashed, script
from btx.running.launchers.slurm_script import sbatch_script

SUBMIT = r"""#!/usr/bin/env bash
# Submits every job of a run to Slurm, each to start when those it needs have ended well; written by `btx launch
# --for slurm`, as the batch scripts beside it are. Submitted again, it continues: what is finished is skipped.
# `btx status RUN` says how it goes; scancel with the numbers that are printed ends it.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
cd -- @CWD@
run=@RUN@

@BTX@ begin /dev/stdin <<'RECIPE'
@RECIPE@
RECIPE
mkdir -p -- "$run/logs"

declare -A id
cancel_all() {  # half a run would be worse than none
  if [ "$1" -ne 0 ] && [ "${#id[@]}" -gt 0 ]; then scancel "${id[@]}"; fi
}
trap 'cancel_all $?' EXIT

submit() {  # SCRIPT JOB... : prints the job's number; it waits for the jobs with these numbers
  local script=$1 after
  shift
  after=$(IFS=: && echo "$*")
  # A job whose need has failed is cancelled: else it would wait for ever.
  sbatch --parsable ${after:+--dependency="afterok:$after" --kill-on-invalid-dep=yes} "$here/$script" | cut -d ';' -f 1
}

@JOBS@

for name in "${!id[@]}"; do echo "${id[$name]} $name"; done | sort -n
"""


def slurm_text(recipe: Recipe, jobs: list[Job]) -> dict[str, str]:
    """A batch script for each job, as `btx run` with `launch.kind: slurm` submits it, and submit.sh.

    Raises:
        UserError: a path cannot be written into a batch script.
    """
    run = Path(recipe.run_folder)
    scripts = {
        f"{dashed(job.name)}.sbatch": sbatch_script(run, job.stages, log_of(run, job.name), recipe.launch)
        for job in jobs
    }
    lines = []
    for job in jobs:
        after = "".join(f' "${{id[{need}]}}"' for need in job.needs)
        lines.append(f"id[{job.name}]=$(submit {dashed(job.name)}.sbatch{after})")
    return {"submit.sh": script(SUBMIT, recipe, JOBS="\n".join(lines)), **scripts}
