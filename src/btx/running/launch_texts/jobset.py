"""The run as a Kubernetes JobSet (jobset.x-k8s.io/v1alpha2, https://jobset.sigs.k8s.io): `kubectl apply -f`.

Jobs alike are the indexes of one Job: what `dependsOn: Complete` waits for is then all of them, `parallelism` is
`launch.jobs`, and one that fails leaves the others alone (`backoffLimitPerIndex`, Kubernetes 1.29 and later).
"""

from __future__ import annotations

import re
from typing import Any

from btx.errors import UserError
from btx.recipe.loading import dump_recipe
from btx.recipe.schema import Recipe
from btx.running.launch_texts.jobs import RETRIED, VOLUME, Group, Job, gpus_of, groups_of, mount_of, unlike, work_text
from btx.running.launch_texts.yaml_text import Image, yaml_text

HEADER = """\
# Every job of the run {run!r} as a Kubernetes JobSet; written by `btx launch --for jobset`.
#   kubectl apply -f THIS_FILE          applied again after `kubectl delete jobset {name}`, it continues
# Before: the JobSet controller (0.9 or later); an image with btx in it, to be named behind `&image`; a claim {claim}
# of a file system that all nodes can write (ReadWriteMany), which is {mount} in the pods. Files that the recipe
# names by relative paths are looked for there.
# A pod that is evicted gets {grace} s to save, and its successor goes on from there; so it is with exit code 75 (what
# it needs is just being made elsewhere). What the user has to mend (exit code 2) is not tried again.
# {gpus}
"""
IMAGE = "branchtrainmix:latest"
GRACE_S = 600
"""Seconds a pod has to write a checkpoint before it is killed."""
MOST_NEEDS = 5
"""Items that `dependsOn` takes."""
NAME_LENGTH = 24
"""Of the JobSet and of its parts: a pod's name is made of both, two numbers and 5 signs, 63 together."""


def jobset_text(recipe: Recipe, jobs: list[Job]) -> dict[str, str]:
    """The JobSet, behind a ConfigMap with the recipe.

    Raises:
        UserError: a job waits for more kinds of jobs than `dependsOn` takes.
    """
    mount = mount_of(recipe)
    name, config = label(recipe.name), f"{label(recipe.name)}-recipe"
    groups = groups_of(jobs)
    labels = _labels(groups)
    for group in groups:
        if len(group.needs) > MOST_NEEDS:
            raise UserError(
                f"--for jobset: {group.name} waits for {', '.join(group.needs)}, and a JobSet's dependsOn takes "
                f"{MOST_NEEDS}; fewer baselines, or --for slurm"
            )
    image = Image(IMAGE)
    parts = [_replicated_job(group, recipe, image, mount, labels, config) for group in groups]
    documents = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": config}, "data": {"recipe.yaml":
            dump_recipe(recipe)}},
        {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": name},
         "spec": {"replicatedJobs": parts}},
    ]  # fmt: skip
    gpus = ("device: cuda, so every process has a GPU" if recipe.device == "cuda" else
            f"device: {recipe.device}, so no GPU is asked for; device=cuda asks for one a process")  # fmt: skip
    header = HEADER.format(run=recipe.run_folder, name=name, claim=VOLUME, mount=mount, grace=GRACE_S, gpus=gpus)
    return {"jobset.yaml": header + yaml_text(documents)}


def _replicated_job(
    group: Group, recipe: Recipe, image: Image, mount: str, labels: dict[str, str], config: str
) -> dict[str, Any]:
    first = not group.needs
    spread = group.nodes > 1  # each of its jobs is a Job of several pods; else all of them are one Job
    shares = group.shares(None)
    retries = recipe.launch.retries
    numbers = (
        # Where one pod of a job fails, all its pods do: each counts.
        {"completions": group.nodes, "parallelism": group.nodes, "backoffLimit": retries * group.nodes} if spread else
        {"completions": len(shares), "parallelism": min(recipe.launch.jobs or len(shares), len(shares)),
         "backoffLimitPerIndex": retries}
    )  # fmt: skip
    begin = "btx begin /etc/btx/recipe.yaml || exit\n" if first else ""
    work = work_text(recipe.run_folder, shares, "$BTX_JOB" if spread else "$JOB_COMPLETION_INDEX")
    container: dict[str, Any] = {
        "name": "btx",
        "image": image,
        "workingDir": mount,
        "command": ["bash", "-c", _unexpanded(begin + work)],
        "volumeMounts": [{"name": "runs", "mountPath": mount}],
    }
    volumes: list[dict[str, Any]] = [{"name": "runs", "persistentVolumeClaim": {"claimName": VOLUME}}]
    if spread:
        container["env"] = _meeting_point(label(recipe.name), labels[group.name])
    if gpus := gpus_of(group, recipe):
        container["resources"] = {"limits": {"nvidia.com/gpu": gpus}}
    if group.processes_a_node > 1:  # processes of one machine talk through shared memory, 64 MiB if nothing is said
        container["volumeMounts"].append({"name": "shared-memory", "mountPath": "/dev/shm"})
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    if first:
        container["volumeMounts"].append({"name": "recipe", "mountPath": "/etc/btx"})
        volumes.append({"name": "recipe", "configMap": {"name": config}})
    rules: list[dict[str, Any]] = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": RETRIED}},
        {"action": "FailJob" if spread else "FailIndex", "onExitCodes": {"operator": "In", "values": [2]}},
    ]
    pod = {"restartPolicy": "Never", "terminationGracePeriodSeconds": GRACE_S, "containers": [container],
           "volumes": volumes}  # fmt: skip
    needs = {"dependsOn": [{"name": labels[need], "status": "Complete"} for need in group.needs]} if group.needs else {}
    return {
        "name": labels[group.name],
        **needs,
        "replicas": len(shares) if spread else 1,
        "template": {"spec": {"completionMode": "Indexed", **numbers, "podFailurePolicy": {"rules": rules},
                              "template": {"spec": pod}}},
    }  # fmt: skip


def _meeting_point(jobset: str, part: str) -> list[dict[str, Any]]:
    """Where the machines of a job meet: at its first pod, by the name that JobSet gives it."""
    job_index = "metadata.labels['jobset.sigs.k8s.io/job-index']"
    pod_index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "BTX_JOB", "valueFrom": {"fieldRef": {"fieldPath": job_index}}},
        {"name": "BTX_HEAD", "value": f"{jobset}-{part}-$(BTX_JOB)-0.{jobset}"},
        {"name": "BTX_NODE", "valueFrom": {"fieldRef": {"fieldPath": pod_index}}},
    ]


def _unexpanded(text: str) -> str:
    """Kubernetes reads `$(NAME)` and `$$` in commands; what is meant for the shell is written so that it stays."""
    return text.replace("$", "$$") if re.search(r"\$[$(]", text) else text


def label(name: str) -> str:
    """A name as Kubernetes takes it: a DNS label that begins with a letter (RFC 1035)."""
    plain = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:NAME_LENGTH].strip("-")
    return plain if plain[:1].isalpha() else f"run-{plain}"[:NAME_LENGTH].strip("-")


def _labels(groups: list[Group]) -> dict[str, str]:
    """Group → its name in Kubernetes; names that become the same get numbers."""
    labels: dict[str, str] = {}
    for group in groups:
        labels[group.name] = unlike(label(group.name), labels.values(), NAME_LENGTH)
    return labels
