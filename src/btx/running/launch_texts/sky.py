"""The run as a SkyPilot pipeline (https://docs.skypilot.co, managed jobs): `sky jobs launch`.

A pipeline's tasks run one after the other. So jobs that may run side by side are one task with a node for each.
"""

from __future__ import annotations

import shlex
from typing import Any

from btx.recipe.loading import dump_recipe
from btx.recipe.schema import Recipe
from btx.running.launch_texts.jobs import RETRIED, VOLUME, Group, Job, gpus_of, groups_of, mount_of, work_text
from btx.running.launch_texts.yaml_text import yaml_text

HEADER = """\
# Every job of the run {run!r} as a SkyPilot pipeline of managed jobs; written by `btx launch --for sky`.
#   sky jobs launch THIS_FILE           launched again, it continues: what is finished is skipped
# Before: a volume {volume} (`sky volumes apply`) that all nodes can write, with renames and locks: no mounted bucket.
# It is {mount} on the nodes. Files that the recipe names by relative paths are looked for there.
# What SkyPilot cannot say: it has no graph of jobs. Tasks run one after the other, in an order that the recipe allows;
# jobs that may run side by side are the nodes of one task, which get their machines together and end together: where
# one fails the others are stopped, and all go on from their last checkpoints.
# {accelerators}
"""
ACCELERATOR = "H100"


def sky_text(recipe: Recipe, jobs: list[Job]) -> dict[str, str]:
    """The pipeline: a document with its name, and one for each task."""
    mount = mount_of(recipe)
    tasks = [_task(group, recipe, mount) for group in groups_of(jobs)]
    accelerators = (f"{ACCELERATOR}: put in the GPUs that you have" if recipe.device == "cuda" else
                    f"device: {recipe.device}, so no GPU is asked for; device=cuda asks for one a process")  # fmt: skip
    header = HEADER.format(run=recipe.run_folder, volume=VOLUME, mount=mount, accelerators=accelerators)
    documents = [{"name": recipe.name.replace("_", "-").replace(".", "-").lower()}, *tasks]
    return {"sky.yaml": header + yaml_text(documents)}


def _task(group: Group, recipe: Recipe, mount: str) -> dict[str, Any]:
    shares = group.shares(recipe.launch.jobs)
    resources: dict[str, Any] = {
        "job_recovery": {"max_restarts_on_errors": recipe.launch.retries, "recover_on_exit_codes": RETRIED}
    }
    if gpus := gpus_of(group, recipe):
        resources["accelerators"] = f"{ACCELERATOR}:{gpus}"
    return {
        "name": group.name.replace("_", "-").replace(".", "-").lower(),
        "num_nodes": len(shares) * group.nodes,
        "resources": resources,
        "volumes": {mount: VOLUME},
        "setup": "pip install branchtrainmix\n",
        "run": _script(group, recipe, shares, mount),
    }


def _script(group: Group, recipe: Recipe, shares: list[tuple[str, ...]], mount: str) -> str:
    """What each node does: its share of the group."""
    lines = ["set -eu", f"cd {shlex.quote(mount)}"]
    if not group.needs:
        lines += ["btx begin /dev/stdin <<'RECIPE'", dump_recipe(recipe).rstrip("\n"), "RECIPE"]
    rank = "$SKYPILOT_NODE_RANK"
    if group.nodes > 1:
        first = f"$((SKYPILOT_NODE_RANK / {group.nodes} * {group.nodes} + 1))"
        lines += [
            f'BTX_HEAD=$(echo "$SKYPILOT_NODE_IPS" | sed -n "{first}p")',
            f"BTX_NODE=$((SKYPILOT_NODE_RANK % {group.nodes}))",
            "export BTX_HEAD BTX_NODE",
        ]
        rank = f"$((SKYPILOT_NODE_RANK / {group.nodes}))"
    return "\n".join([*lines, work_text(recipe.run_folder, shares, rank)])
