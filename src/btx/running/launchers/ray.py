"""Jobs of a Ray cluster, by its job server (https://docs.ray.io/en/latest/cluster/running-applications/job-submission/,
checked with Ray 2.60): an entrypoint with resources of its own runs on the node that has them, and outlives whoever
submitted it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import uuid
import weakref
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil

from btx.errors import SystemFailed, UserError
from btx.recipe.launch import Launch
from btx.running.launchers.job import SAVED, VARIABLES, Handle, Standing, btx_command, refuse_several_nodes
from btx.running.launchers.own_ray import OwnRay

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

INSTALL = 'pip install "branchtrainmix[ray]"'
STOPPING = {"RAY_JOB_STOP_WAIT_TIME_S": str(24 * 3600)}
"""Seconds a job that is asked to end may take to save before it is killed; Ray's own 3 are too few for a checkpoint."""
PASSED = ("PYTHONPATH",)
"""Variables that a job gets from whoever submits it; all else is as on its node."""
WAITED_TOO_LONG = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"
"""What Ray calls a job that found no free resources in 15 minutes."""


class RayLauncher:
    """Submits jobs to the cluster at `launch.ray.address`; without one to a Ray of this machine that is started with
    the first job and ends with this process, its jobs with it."""

    takes_waiting = False

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._own: OwnRay | None = None
        self._clients: dict[str, JobSubmissionClient] = {}

    @property
    def goes_on(self) -> bool:
        """Whether jobs go on when this process ends: those of a cluster do."""
        return self._launch.ray.address is not None

    def check(self, run: Path, jobs: Sequence[Sequence[str]]) -> None:
        """Refuse to begin without Ray, without a cluster that answers, or with models that several nodes train.

        Raises:
            UserError: with what to do.
        """
        if find_spec("ray") is None:
            raise UserError(f"launch.kind: ray needs Ray, which is not installed: {INSTALL}")
        refuse_several_nodes(self._launch, jobs, "a job of Ray has one node")
        if (address := self._launch.ray.address) is not None:
            try:
                self._client(address)
            except SystemFailed as error:
                raise UserError(f"launch.ray.address: {error}") from error

    def submit(self, run: Path, stages: Sequence[str], log: Path, *, after: Sequence[Handle] = ()) -> Handle:
        """Submit the job; what it claims decides on which node Ray starts it."""
        address = self._launch.ray.address or self._own_address(run)
        log = log.resolve()
        log.parent.mkdir(parents=True, exist_ok=True)
        work = shlex.join([*btx_command(), "work", str(run), *stages])
        claims = _claims(self._launch, stages[0])
        passed = {name: os.environ[name] for name in PASSED if name in os.environ}
        job = {
            "entrypoint": f"exec >> {shlex.quote(str(log))} 2>&1; cd {shlex.quote(str(Path.cwd()))} && exec {work}",
            "submission_id": re.sub(r"[^\w.-]", "-", f"{run.name}-{stages[0]}-{uuid.uuid4().hex[:8]}"),
            "runtime_env": {"env_vars": VARIABLES | STOPPING | passed},
            "metadata": {"run": str(run.resolve()), "claims": json.dumps(claims)},
        }
        with _answering(address):
            name = self._client(address).submit_job(**job, **claims)
        handle = {"address": address, "submission_id": name}
        return handle if self.goes_on else handle | {"pid": os.getpid(), "node": platform.node()}

    def _own_address(self, run: Path) -> str:
        if self._own is None:
            self._own = OwnRay(run / "logs" / "ray.log")
            weakref.finalize(self, self._own.end)
        return self._own.address

    def poll(self, handles: Sequence[Handle]) -> list[Standing]:
        return [self._poll(handle) for handle in handles]

    def _poll(self, handle: Handle) -> Standing:
        if self._is_anothers(handle):
            lives = handle["node"] == platform.node() and psutil.pid_exists(handle["pid"])
            return Standing("running" if lives else "ended")
        job = self._job(handle)
        if job is None:
            return Standing("ended", why="the cluster knows it no longer")
        if job.status == "PENDING":
            return Standing("queued", why=job.message or "")
        if not job.status.is_terminal():
            return Standing("running", node=urlsplit(job.driver_agent_http_address or "").hostname)
        if job.status == "FAILED" and job.driver_exit_code is None:  # its node died, for example
            return Standing("ended", 1, why=f"Ray: {job.message}")
        return Standing("ended", SAVED if job.status == "STOPPED" else job.driver_exit_code)  # Ray keeps none then

    def cancel(self, handle: Handle) -> None:
        """Ask a job to save and end; those of another process's own Ray do when that process ends."""
        if self._is_anothers(handle):
            return
        job = self._job(handle)
        if job is not None and job.submission_id is not None:
            with _answering(handle["address"]):
                self._client(handle["address"]).stop_job(job.submission_id)

    def kill(self, handle: Handle) -> None:
        """Ask a job to end: Ray kills one only when it has not ended long after."""
        self.cancel(handle)

    def _is_anothers(self, handle: Handle) -> bool:
        """Whether a job's Ray is one that another process has started for itself."""
        return "pid" in handle and (self._own is None or handle["address"] != self._own.address)

    def _job(self, handle: Handle) -> JobDetails | None:
        """What the job server knows of a job; None if it knows none such.

        Ray gives up a job that has waited 15 minutes for resources: it is submitted again, under a name that every
        other process finds as well.
        """
        with _answering(handle["address"]):
            client, name = self._client(handle["address"]), handle["submission_id"]
            while (job := _details(client, name)) is not None and job.error_type == WAITED_TOO_LONG:
                name += "+"
                if _details(client, name) is None:
                    claims = json.loads((job.metadata or {})["claims"])
                    client.submit_job(entrypoint=job.entrypoint, submission_id=name, runtime_env=job.runtime_env,
                                      metadata=job.metadata, **claims)  # fmt: skip
            return job

    def _client(self, address: str) -> JobSubmissionClient:
        if address not in self._clients:
            with _answering(address):
                from ray.job_submission import JobSubmissionClient

                self._clients[address] = JobSubmissionClient(address)
        return self._clients[address]


@contextlib.contextmanager
def _answering(address: str) -> Iterator[None]:
    """Ray's errors as btx's: it is not there, or refuses."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise SystemFailed(f"Ray at {address} does not answer as it should: {error}") from error


def _claims(launch: Launch, stage: str) -> dict[str, Any]:
    """What a job claims for all its processes, as Ray's job server takes it."""
    processes, job = launch.processes_of(stage), launch.ray_of(stage)
    return {
        "entrypoint_num_cpus": processes * (job.cpus or launch.threads or 1),
        "entrypoint_num_gpus": processes * (job.gpus or 0),
        "entrypoint_resources": job.resources or {},
    }


def _details(client: JobSubmissionClient, name: str) -> JobDetails | None:
    """None if the job server knows no such job."""
    try:
        return client.get_job_info(name)
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise
