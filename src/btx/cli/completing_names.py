"""What a shell offers when Tab is pressed: names of recipes, stages, models and the like. No torch: Tab is instant."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx.choices.merges import MERGE_METHODS
from btx.choices.router_inits import ROUTER_INITS
from btx.errors import BtxError
from btx.files import home_filled

if TYPE_CHECKING:
    from btx.run_folder.folder import RunFolder


def recipes(incomplete: str) -> list[str]:
    """Packaged recipes, and the .yaml files and run folders of the folder that is typed."""
    from btx.recipe.loading import packaged_recipes

    typed = incomplete[: incomplete.rfind("/") + 1]
    here = home_filled(typed or ".")
    files = [typed + path.name for path in here.glob("*.yaml")]
    folders = [typed + path.parent.name for path in here.glob("*/recipe.yaml")]
    return _starting(incomplete, [*packaged_recipes(), *files, *folders])


def packaged(incomplete: str) -> list[str]:
    """Packaged recipes."""
    from btx.recipe.loading import packaged_recipes

    return _starting(incomplete, packaged_recipes())


def kinds(incomplete: str) -> list[str]:
    """What `btx ls` lists."""
    from btx.cli.catalogue import CATALOGUE

    return _starting(incomplete, CATALOGUE)


def merges(incomplete: str) -> list[str]:
    """Merge methods."""
    return _starting(incomplete, MERGE_METHODS)


def router_inits(incomplete: str) -> list[str]:
    """How routers start."""
    return _starting(incomplete, ROUTER_INITS)


def domains(ctx: Any, incomplete: str) -> list[str]:
    """The branches of the run that stands on the command line, and its seed model."""
    run = _run_of(ctx)
    return _starting(incomplete, ["seed", *run.recipe.train.domains] if run else [])


def stages(ctx: Any, incomplete: str) -> list[str]:
    """The stages of the recipe or run that stands on the command line."""
    run = _run_of(ctx)
    return _starting(incomplete, dict.fromkeys(stage.name.partition("/")[0] for stage in run.graph) if run else [])


def run_baselines(ctx: Any, incomplete: str) -> list[str]:
    """The baselines of the run that stands on the command line."""
    run = _run_of(ctx)
    return _starting(incomplete, run.recipe.baselines if run else [])


def models(ctx: Any, incomplete: str) -> list[str]:
    """The models of the run that stands on the command line."""
    from btx.outputs import read_output
    from btx.reporting.shapes import Results

    run, results = _run_of(ctx), None
    with suppress(BtxError):  # Tab says no errors
        results = read_output(run.path / "evaluate" / "results.json", Results) if run else None
    return _starting(incomplete, results["models"] if results else [])


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _run_of(ctx: Any) -> RunFolder | None:
    """The run of a folder or recipe on the command line; None if there is none that can be read: Tab says no errors."""
    from btx.recipe.loading import load_recipe
    from btx.run_folder.folder import RunFolder

    # While a value of an option is completed, the arguments before it stand in `args` and not yet in `params`.
    named = ctx.params.get("run_folder") or ctx.params.get("recipe") or next(iter(ctx.args), None)
    try:
        if named is None:
            return None
        if (Path(named) / "recipe.yaml").is_file():
            return RunFolder.open(Path(named))
        recipe = load_recipe(str(named))
        return RunFolder(Path(recipe.run_folder), recipe)
    except (BtxError, OSError):
        return None
