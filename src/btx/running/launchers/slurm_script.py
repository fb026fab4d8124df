"""The text that sbatch gets for a job, by `btx run` as by hand (https://slurm.schedmd.com/sbatch.html).

What was measured with Slurm 22.05 decides its form. Only processes that srun starts are told in time: at preemption
with a grace time, and by `--signal` before the time limit, the batch script itself gets no signal. A job that then
saves and ends has *failed* for Slurm, which requeues by itself only what it has to kill; so the script asks for that,
once all of the job's processes have ended. Jobs that wait for it wait on meanwhile.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from btx.errors import UserError
from btx.recipe.launch import Launch, trains
from btx.running.launchers.job import SAVED, VARIABLES, btx_command

PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]*")

SCRIPT = """\
#!/bin/bash
{options}
set -e
export {variables}
export SRUN_CPUS_PER_TASK="${{SLURM_CPUS_PER_TASK:-1}}"  # srun does not take it from sbatch
{setup}exit_code=0
srun --nodes={nodes} --ntasks-per-node=1 --export=ALL {work} || exit_code=$?
if [ "$exit_code" -eq {saved} ]; then  # told to end, it has saved: back into the queue, where it goes on
    scontrol requeue "$SLURM_JOB_ID" && exit
fi
exit "$exit_code"
"""


def sbatch_script(run: Path, stages: Sequence[str], log: Path, launch: Launch) -> str:
    """A batch script that does some stages of a run in one job.

    Args:
        stages: all with the same `launch.resources_of`.
        log: its output goes there, behind what is there; the folder has to exist when the job starts.

    Raises:
        UserError: the path of the run cannot be written into a batch script.
    """
    run, log, here = run.absolute(), log.absolute(), Path.cwd()
    for path in (log, here):
        if re.search(r"[\n\r\\]", str(path)):
            raise UserError(
                f"{str(path)!r}: Slurm takes no path with a line break or a backslash in it; choose another"
            )
    job, nodes = launch.slurm_of(stages[0]), launch.nodes_of(stages[0])
    asked = {
        "job-name": stages[0],
        "output": str(log).replace("%", "%%"),
        "open-mode": "append",
        "requeue": None,
        "chdir": str(here),
        "nodes": str(nodes),
        "ntasks-per-node": "1",
    }
    if launch.threads is not None:
        asked["cpus-per-task"] = str(launch.threads)
    if any(map(trains, stages)):  # what does not save would begin anew again and again
        asked["signal"] = f"TERM@{launch.slurm.grace_s}"
    asked |= {field: value for field in ("account", "partition", "gres", "time") if (value := getattr(job, field))}
    options = [f"--{option}" if value is None else f"--{option}={value}" for option, value in asked.items()]
    variables = VARIABLES | ({"PYTHONPATH": search} if (search := os.environ.get("PYTHONPATH")) else {})
    return SCRIPT.format(
        options="\n".join(f"#SBATCH {_quoted(option)}" for option in (*options, *(job.options or ()))),
        variables=" ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
        setup="".join(f"{line}\n" for line in job.setup or ()),
        nodes=nodes,
        work=shlex.join([*btx_command(), "work", str(run), *stages]),
        saved=SAVED,
    )


def _quoted(option: str) -> str:
    """An option as sbatch reads it in a script: as C has it, but that a backslash escapes any character."""
    if PLAIN.fullmatch(option):
        return option
    return '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"'
