"""How jobs are started: one file a launcher, one table that the pipeline goes by (`launch.kind`). What launchers there
are, for a recipe and `btx ls`, is in `btx.choices.launchers`.
"""

from collections.abc import Callable

from btx.recipe.launch import Launch
from btx.running.launchers.job import Handle, Launcher, Standing
from btx.running.launchers.local import LocalLauncher
from btx.running.launchers.ray import RayLauncher
from btx.running.launchers.slurm import SlurmLauncher

START: dict[str, Callable[[Launch, str], Launcher]] = {
    "local": LocalLauncher,
    "slurm": lambda launch, device: SlurmLauncher(launch),  # an engine is told of GPUs by the recipe, or knows them
    "ray": lambda launch, device: RayLauncher(launch),
}
"""`launch.kind` → the launcher with the settings of a recipe, of which it gets `launch` and `device`."""

__all__ = ["START", "Handle", "Launcher", "Standing"]
