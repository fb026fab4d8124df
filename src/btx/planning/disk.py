"""Whether what a run will write fits on the disk."""

from __future__ import annotations

from typing import Any

from btx.errors import RunFolderError
from btx.planning.costs import Costs, run_costs
from btx.run_folder.folder import RunFolder
from btx.system_errors import free_bytes


def bytes_to_write(run: RunFolder, costs: Costs) -> int:
    """Models and checkpoints of the stages that are not finished; of a finished one, one checkpoint of two is gone."""
    to_do = [costs[stage.name] for stage in costs.graph if run.state(stage) != "done"]
    return sum(cost.disk_bytes - cost.checkpoint_bytes for cost in to_do) + max(
        (cost.checkpoint_bytes for cost in to_do), default=0
    )


def check_disk(run: RunFolder, dense: dict[str, Any]) -> None:
    """Refuse a run whose models and checkpoints do not fit on the disk.

    Args:
        dense: the seed model's config, completed with its class's defaults.

    Raises:
        RunFolderError: says how much is needed and free.
    """
    needed, free = bytes_to_write(run, run_costs(run, dense, None)), free_bytes(run.path)
    if needed > free:
        raise RunFolderError(
            f"{run.path}: models and checkpoints of this run take about {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} "
            f"GB are free there; free space, choose another disk with run=FOLDER, or leave baselines out (btx plan has "
            f"the size of every stage)"
        )
