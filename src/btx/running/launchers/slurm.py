"""Jobs of a Slurm cluster (https://slurm.schedmd.com), by its own programs; checked with Slurm 22.05.

All jobs of a run are submitted at once, each waiting for those it needs (`afterok`), and go on when `btx run` ends.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from btx.errors import SystemFailed, UserError
from btx.recipe.launch import Launch
from btx.running.launchers.job import Handle, Standing
from btx.running.launchers.slurm_script import sbatch_script

ASK_EVERY_S = 3.0
"""Seconds between two questions to the queue, which all users of a cluster share."""
PATIENCE_S = 60.0
"""Seconds that one of Slurm's programs may take to answer."""
QUEUED = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE",
         "PREEMPTED", "REVOKED"}  # fmt: skip
"""States of jobs (https://slurm.schedmd.com/job_state_codes.html); in all others a job has nodes."""
NOT_NOW = re.compile(r"contact slurm|timed out|refused|communication|fetch_config|establish|process conf", re.I)
"""What Slurm's programs say when it is not the request that is wrong."""


class SlurmLauncher:
    """Submits every job with sbatch, and asks squeue for all of them in one call."""

    takes_waiting = True
    goes_on = True

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._standings: dict[str, Standing] = {}
        self._asked = float("-inf")

    def check(self, run: Path, jobs: Sequence[Sequence[str]]) -> None:
        checked = []
        for stages in jobs:
            if (resources := self._launch.resources_of(stages[0])) not in checked:
                checked.append(resources)
                self._sbatch(run, stages, run / "logs" / "x.log", "--test-only")

    def submit(self, run: Path, stages: Sequence[str], log: Path, *, after: Sequence[Handle] = ()) -> Handle:
        log.parent.mkdir(parents=True, exist_ok=True)
        options = []
        if after:  # a job whose need has failed is cancelled: else it would wait for ever
            options = [f"--dependency=afterok:{':'.join(handle['job_id'] for handle in after)}",
                       "--kill-on-invalid-dep=yes"]  # fmt: skip
        job = self._sbatch(run, stages, log, "--parsable", *options).strip().partition(";")[0]
        self._standings[job] = Standing("queued")
        return {"job_id": job}

    def _sbatch(self, run: Path, stages: Sequence[str], log: Path, *options: str) -> str:
        script = sbatch_script(run, stages, log, self._launch)
        try:
            return _slurm("sbatch", *options, script=script)
        except SystemFailed as error:
            if NOT_NOW.search(str(error)):
                raise SystemFailed(f"Slurm does not answer: {error}") from error
            raise UserError(f"{stages[0]}: Slurm refuses the job that launch.slurm asks for: {error}") from error

    def poll(self, handles: Sequence[Handle]) -> list[Standing]:
        """How jobs stand. Slurm forgets those that ended some minutes ago (`MinJobAge`)."""
        jobs = [str(handle["job_id"]) for handle in handles]
        if not self._standings.keys() >= set(jobs) or time.monotonic() - self._asked > ASK_EVERY_S:
            self._standings |= dict.fromkeys(jobs, Standing("ended")) | _queue(jobs)
            self._asked = time.monotonic()
        return [self._standings[job] for job in jobs]

    def cancel(self, handle: Handle) -> None:
        """Ask a job to save and end: it is told by a signal, as at preemption, but is not put back into the queue."""
        job = str(handle["job_id"])
        if self._is_over(job):
            return
        try:
            _slurm("scontrol", "update", f"JobId={job}", "Requeue=0")
            _slurm("scancel", "--state=PENDING", job)
            steps = _slurm("squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i").split()
            # Where no step of srun's runs that could save, the job waits, or is just at its setup.
            has_steps = any(step.rpartition(".")[2].isdigit() for step in steps)
            _slurm("scancel", *(["--signal=TERM"] if has_steps else []), job)
        except SystemFailed:
            if not self._is_over(job):
                raise

    def kill(self, handle: Handle) -> None:
        """End a job: it is asked to, and killed after `KillWait` seconds."""
        _slurm("scancel", str(handle["job_id"]))

    def _is_over(self, job: str) -> bool:
        self._asked = float("-inf")
        return self.poll([{"job_id": job}])[0].state == "ended"


def _queue(jobs: Sequence[str]) -> dict[str, Standing]:
    """How those of the jobs stand that Slurm knows."""
    fields = "JobID:|,State:|,exit_code:|,NodeList:|,Reason:|"
    try:
        answer = _slurm("squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", f"--Format={fields}")
    except SystemFailed as error:
        if "Invalid job id" in str(error):  # what it says of a single job that it does not know
            return {}
        raise
    lines = [line.split("|") for line in answer.splitlines() if line.count("|") >= 5]
    return {job: _standing(state, int(status), nodes, why) for job, state, status, nodes, why, *_ in lines}


def _standing(state: str, status: int, nodes: str, why: str) -> Standing:
    """What squeue says of a job.

    Args:
        status: as of wait(2).
    """
    if state in QUEUED:
        return Standing("queued", why="" if why == "None" else why)
    if state not in ENDED:
        return Standing("running", node=nodes or None)
    exit_code = -(status & 127) or status >> 8
    if state != "COMPLETED" and not exit_code:
        exit_code = -15  # never begun, or ended with all it had started
    return Standing("ended", exit_code, nodes or None, "" if state in ("COMPLETED", "FAILED") else state)


def _slurm(program: str, *arguments: str, script: str | None = None) -> str:
    """What one of Slurm's programs prints.

    Raises:
        UserError: it is not here.
        SystemFailed: what it says when it fails.
    """
    if shutil.which(program) is None:
        raise UserError(f"launch.kind: slurm: there is no {program} on this machine; use one that submits jobs to the "
                        f"cluster, a login node for example, or launch.kind=local")  # fmt: skip
    # Inside of a job, its own environment would say how large the jobs are that it submits.
    inherits = "SLURM_JOB_ID" in os.environ
    environment = {
        name: value for name, value in os.environ.items()
        if not (inherits and name.startswith("SLURM_")) or name == "SLURM_CONF"
    }  # fmt: skip
    try:
        done = subprocess.run([program, *arguments], input=script or "", capture_output=True, text=True,
                              errors="replace", timeout=PATIENCE_S, env=environment)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise SystemFailed(f"{program} timed out: no answer in {PATIENCE_S:.0f} s") from None
    if done.returncode != 0:
        lines = [line.removeprefix(f"{program}: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        raise SystemFailed("; ".join(filter(None, lines)) or f"{program} ended with exit code {done.returncode}")
    return done.stdout
