"""Jobs of a Ray cluster, by its job server (https://docs.ray.io/en/latest/cluster/running-applications/job-submission/,
checked with Ray 2.60): an entrypoint with resources of its own runs on the node that has them, and outlives whoever
submitted it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import secrets
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from btx.errors import SystemFailed, UserError
from btx.process import SAVE_AND_END, TOLD
from btx.recipe.launch import Launch
from btx.run_folder.threads import processors
from btx.running.launchers.job import Handle

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

INSTALL = 'pip install "branchtrainmix[ray]"'
SAVING_S = 24 * 3600
"""How long a job that is asked to end may take to save before Ray kills it; Ray's own 3 s are too short for a
checkpoint. Ray reads it from the job's environment."""
SILENT_S = 600.0
"""How long the job server may be out of reach: its machine may start again, and jobs go on meanwhile."""
SAVED = 128 + signal.SIGTERM
"""Exit code of a job that was asked to end; Ray keeps none."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Memory for objects that Ray's tasks share, in a Ray of this machine: btx has none, and Ray takes a third of all."""
WAITED_TOO_LONG = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"
"""What Ray calls a job that found no free resources in 15 minutes."""


def check_ray(launch: Launch) -> None:
    """Refuse `launch.kind: ray` where Ray is not installed, or models that more than one node trains together.

    Raises:
        UserError: with what to do.
    """
    if find_spec("ray") is None:
        raise UserError(f"launch.kind: ray needs Ray, which is not installed: {INSTALL}")
    if (launch.nodes if isinstance(launch.nodes, int) else max(launch.nodes.values(), default=1)) > 1:
        raise UserError(
            "launch.nodes: a job of Ray has one node, on which launch.processes train its model together; for more use "
            "launch.kind=slurm, or launch.nodes=1"
        )


class RayLauncher:
    """Submits jobs to the cluster at `launch.ray.address`; without one to a Ray of this machine that is started for
    this process and ends with it, however it ends."""

    takes_waiting = False

    def __init__(self, launch: Launch) -> None:
        check_ray(launch)
        self._launch = launch
        self._clients: dict[str, JobSubmissionClient] = {}
        self._heard: dict[str, float] = {}
        """Address → when its job server last answered, in seconds of a clock of this process."""

    def submit(self, run: Path, stages: Sequence[str], log: Path, *, after: Sequence[Handle] = ()) -> Handle:
        """Submit the job; what it claims decides on which node Ray starts it."""
        address = self._launch.ray.address or _local_ray()
        log = log.resolve()
        log.parent.mkdir(parents=True, exist_ok=True)
        work = shlex.join([sys.executable, "-m", "btx", "work", str(run), *stages])
        variables = {
            "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "TOKENIZERS_PARALLELISM": "true",
            "RAY_JOB_STOP_WAIT_TIME_S": str(SAVING_S),
        } | {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}  # fmt: skip
        claims = _claims(self._launch, stages)
        job = {
            "entrypoint": f"exec >> {shlex.quote(str(log))} 2>&1; cd {shlex.quote(str(Path.cwd()))} && exec {work}",
            "submission_id": re.sub(r"[^\w.-]", "-", f"{run.name}-{stages[0]}-{uuid.uuid4().hex[:8]}"),
            "runtime_env": {"env_vars": variables},
            "metadata": {"run": str(run.resolve()), "claims": json.dumps(claims)},
        }
        try:
            name = self._client(address).submit_job(**job, **claims)
        except (OSError, RuntimeError) as error:
            raise UserError(f"launch.ray.address: {address} does not take the job {stages[0]}: {error}") from error
        handle = {"address": address, "submission_id": name, "log": str(log)}
        return handle if self._launch.ray.address else handle | {"pid": os.getpid(), "node": platform.node()}

    def poll(self, handle: Handle) -> int | None:
        """Exit code of a job; what Ray itself says of one that it lost, with its node for example, goes to its log."""
        if _is_anothers(handle):
            return None if psutil.pid_exists(handle["pid"]) else -signal.SIGKILL
        try:
            job = self._job(handle)
        except OSError as error:
            return self._silent(handle, error)
        self._heard[handle["address"]] = time.monotonic()
        if job is None:
            return _lost(handle, "the cluster knows this job no longer")
        if job.status == "FAILED" and job.driver_exit_code is None:
            return _lost(handle, job.message or "the job was lost")
        if not job.status.is_terminal():
            return None
        return SAVED if job.status == "STOPPED" else job.driver_exit_code

    def cancel(self, handle: Handle) -> None:
        """Ask a job to save and end; of another process's own Ray only that process can, and ends all its jobs."""
        if _is_anothers(handle):
            with contextlib.suppress(ProcessLookupError):
                os.kill(handle["pid"], SAVE_AND_END)
            return
        with contextlib.suppress(OSError):
            if (job := self._job(handle)) is not None and job.submission_id is not None:
                self._client(handle["address"]).stop_job(job.submission_id)

    def _job(self, handle: Handle) -> JobDetails | None:
        """What the job server knows of a job.

        Ray gives up a job that has waited 15 minutes for resources: it is submitted again, under a name that every
        other process finds as well.

        Raises:
            OSError: the job server does not answer.
        """
        client, name = self._client(handle["address"]), handle["submission_id"]
        while (job := _details(client, name)) is not None and job.error_type == WAITED_TOO_LONG:
            name += "+"
            if _details(client, name) is None:
                claims = json.loads((job.metadata or {})["claims"])
                client.submit_job(entrypoint=job.entrypoint, submission_id=name, runtime_env=job.runtime_env,
                                  metadata=job.metadata, **claims)  # fmt: skip
                _note(handle, f"{TOLD}Ray has no free node with {claims}; waiting on")
        return job

    def _silent(self, handle: Handle, error: OSError) -> int | None:
        """What follows from a job server that does not answer."""
        address, now = handle["address"], time.monotonic()
        if now - self._heard.setdefault(address, now) < SILENT_S:
            return None
        raise SystemFailed(f"Ray at {address} does not answer: {error}; when it does, the same command goes on")

    def _client(self, address: str) -> JobSubmissionClient:
        """Raises OSError if the job server does not answer."""
        if address not in self._clients:
            from ray.job_submission import JobSubmissionClient

            self._clients[address] = JobSubmissionClient(address)
        return self._clients[address]


def _claims(launch: Launch, stages: Sequence[str]) -> dict[str, Any]:
    """What a job claims, as Ray's job server takes it: of everything the most that one of its stages needs."""
    claims = [(launch.processes_of(stage), launch.ray.claims_of(stage)) for stage in stages]
    resources = {name for _, claim in claims for name in claim.resources}
    return {
        "entrypoint_num_cpus": max(count * (claim.cpus or launch.threads or 1) for count, claim in claims),
        "entrypoint_num_gpus": max(count * claim.gpus for count, claim in claims),
        "entrypoint_resources": {name: max(claim.resources.get(name, 0) for _, claim in claims) for name in resources},
    }


def _details(client: JobSubmissionClient, name: str) -> JobDetails | None:
    """None if the job server knows no such job."""
    try:
        return client.get_job_info(name)
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise OSError(str(error)) from error  # it is just starting or ending


def _lost(handle: Handle, why: str) -> int:
    _note(handle, f"error: Ray: {why}")
    return 1


def _note(handle: Handle, line: str) -> None:
    """Say something in a job's log that only Ray knows."""
    with open(handle["log"], "a", encoding="utf-8") as log:
        log.write(f"{line}\n")


def _is_anothers(handle: Handle) -> bool:
    """Whether a job is one of a Ray that another process of this machine has started for itself.

    Raises:
        UserError: a process of another machine.
    """
    if handle.get("node", platform.node()) != platform.node():
        raise UserError(f"{handle['submission_id']} is a job of process {handle['pid']} on {handle['node']}, which "
                        f"started a Ray of its own; ask there")  # fmt: skip
    return handle.get("pid", os.getpid()) != os.getpid()


def _local_ray() -> str:
    """Address of the Ray of this process, started when it is first asked for.

    It listens on the loopback interface, and only who has its token is let in (Ray 2.52 and later). Ray ends what it
    has started with this process, kill -9 included.
    """
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        started = ray.init(
            address="local", num_cpus=processors(), object_store_memory=OBJECT_STORE_BYTES, include_dashboard=True,
            dashboard_host="127.0.0.1", log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray takes it; here it means: save and end
    return f"http://{started.dashboard_url}"
