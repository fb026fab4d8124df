"""A run as text to submit by hand, for engines that btx itself does not talk to: one file a format, one table."""

from collections.abc import Callable

from btx.recipe.schema import Recipe
from btx.running.launch_texts.jobs import Job, jobs_of
from btx.running.launch_texts.jobset import jobset_text
from btx.running.launch_texts.shell import shell_text
from btx.running.launch_texts.sky import sky_text
from btx.running.launch_texts.slurm import slurm_text

TEXTS: dict[str, Callable[[Recipe, list[Job]], dict[str, str]]] = {
    "slurm": slurm_text,
    "jobset": jobset_text,
    "sky": sky_text,
    "shell": shell_text,
}
"""`btx launch --for NAME` → what makes its files' texts of a recipe and its jobs."""


def launch_text(recipe: Recipe, kind: str) -> dict[str, str]:
    """File name → text of all that is to be submitted; every job is a `btx work RUN STAGE...`, as with `btx run`.

    Raises:
        UserError: the engine cannot do what the recipe's `launch` asks for.
    """
    recipe = recipe.model_copy(update={"run": recipe.run_folder})  # the same folder for all who read the text
    if kind == "slurm":  # so that stages which ask Slurm for something else are jobs of their own
        recipe = recipe.model_copy(update={"launch": recipe.launch.model_copy(update={"kind": "slurm"})})
    return TEXTS[kind](recipe, jobs_of(recipe))


__all__ = ["TEXTS", "launch_text"]
