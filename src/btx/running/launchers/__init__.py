"""How jobs are started: one file a launcher, one table that the pipeline goes by (`launch.kind`). What launchers there
are, for a recipe and `btx ls`, is in `btx.choices.launchers`.
"""

from collections.abc import Callable

from btx.recipe.schema import Recipe
from btx.running.launchers.job import Handle, Launcher, Standing
from btx.running.launchers.local import LocalLauncher
from btx.running.launchers.ray import RayLauncher
from btx.running.launchers.slurm import SlurmLauncher

START: dict[str, Callable[[Recipe], Launcher]] = {
    "local": lambda recipe: LocalLauncher(recipe.launch, recipe.device),
    "slurm": lambda recipe: SlurmLauncher(recipe.launch),
    "ray": lambda recipe: RayLauncher(recipe.launch),
}
"""`launch.kind` → the launcher with a recipe's settings."""

__all__ = ["START", "Handle", "Launcher", "Standing"]
