"""`btx plan`: what a run reads and will cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from btx.cli import completing_names
from btx.cli.terminal import remark, show, show_json
from btx.errors import UserError

if TYPE_CHECKING:
    from btx.planning.speed import Speed
    from btx.recipe.schema import Recipe

RecipeArgument = Annotated[str, typer.Argument(
    help="Name of a packaged recipe, a .yaml file, or a run folder.", autocompletion=completing_names.recipes
)]  # fmt: skip
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, for example train.tokens=1e6.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    flops_per_second: Annotated[float | None, typer.Option(
        min=1.0,
        help="Training FLOP/s of one device where it will run, for the hours: of a GPU, or of the processors that a "
        "job has on a machine. Default: what the run's first training stage reached, or else a few training steps "
        "timed here.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(
        help="Memory of a GPU, as 24GB: does every training fit, and if not, with which settings? Default: this "
        "machine's GPU, if it has one.")] = None,
    show_recipe: Annotated[bool, typer.Option("--recipe", help="Print the resolved recipe, and nothing else.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """What a run reads and will cost: data, tokens, FLOPs, hours, parameters, memory, disk, stages. Writes nothing."""
    from btx.running.preflight import preflight

    gpu_bytes = None if gpu_memory is None else _gpu_bytes(gpu_memory)
    resolved = resolved_recipe(recipe, overrides)
    if show_recipe:
        from btx.recipe.loading import dump_recipe

        show_json(resolved.model_dump(mode="json")) if as_json else typer.echo(dump_recipe(resolved))
        return
    preflight(resolved)
    from btx.planning.data_look import data_notes, look_into_data
    from btx.run_folder.folder import RunFolder

    data = look_into_data(RunFolder(Path(resolved.run_folder), resolved))
    from btx.planning.plan import plan as make_plan  # and torch with it, after all that is refused without

    planned = make_plan(resolved, speed=_speed(resolved, flops_per_second), gpu_memory=gpu_bytes)
    planned |= {"data": data, "notes": [*planned["notes"], *data_notes(data)]}
    if as_json:
        show_json(planned | {"recipe": resolved.model_dump(mode="json")})
        return
    from btx.cli.tables import plan_tables

    show(*plan_tables(planned))
    typer.echo(f"the recipe with all defaults: btx plan {recipe} --recipe")


def _gpu_bytes(text: str) -> int:
    """What --gpu-memory says."""
    from btx.recipe.sizes import bytes_of

    wanted = "write it as 24GB, 80GiB or 24e9 (bytes)"
    try:
        count = bytes_of(text)
    except UserError as error:
        raise UserError(f"--gpu-memory {text}: this is no size of memory; {wanted}") from error
    if not 1e8 <= count < 1e15:
        raise UserError(f"--gpu-memory {text}: no GPU has {count:,} bytes; {wanted}")
    return count


def _speed(recipe: Recipe, flops_per_second: float | None) -> Speed | None:
    """What `btx plan` tells hours from: what is given, what the run itself reached, what this machine does now; or what
    an H100 did, for a recipe that needs a GPU where there is none."""
    from btx.models.device import choose_device
    from btx.models.seed_config import seed_config
    from btx.planning.speed import H100, Speed, measured_speed, training_speed
    from btx.run_folder.folder import RunFolder
    from btx.run_folder.threads import training_threads

    if flops_per_second is not None:
        return Speed(flops_per_second, "as given")
    run = RunFolder(Path(recipe.run_folder), recipe)
    if (reached := measured_speed(run)) is not None:
        return reached
    try:
        device = choose_device(recipe.device)
    except UserError:  # a recipe for another machine
        return H100
    dense = seed_config(recipe)
    remark("timing a few training steps: 5 seconds at most (--flops-per-second FIGURE does without) ...")
    return training_speed(recipe, dense, device, training_threads(run.graph))


def resolved_recipe(name: str, overrides: list[str] | None) -> Recipe:
    """The recipe that a command is given, with its overrides."""
    from btx.recipe.loading import load_recipe

    return load_recipe(name, overrides or ())
