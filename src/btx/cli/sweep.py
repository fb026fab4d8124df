"""The commands of sweeps: sweep, its overview, and what it starts for every run."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from btx.cli.plan import AsJson, RecipeArgument
from btx.cli.run_folders import is_run, open_run
from btx.cli.terminal import show, show_json, silent


def sweep(
    recipe: RecipeArgument,
    settings: Annotated[list[str] | None, typer.Argument(
        help="key=a,b,c varies a setting; key=value sets it for all variants.")] = None,
    rng_seeds: Annotated[int | None, typer.Option(
        help="Rng seeds of every variant; default: the recipe's sweep.rng_seeds, or 3.")] = None,
    models: Annotated[str | None, typer.Option(help="Models the table shows: btx,dense_cm; default: all.")] = None,
    share: Annotated[list[Path] | None, typer.Option(
        help="Run folder (or a sweep's) whose finished stages are taken over too; repeat.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; each run trains its branches side by side.")] = 1,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Say what would be run and shared, and what it costs; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Variants of a recipe times rng seeds, sharing what they have in common; one table with error bars."""
    from btx.running.preflight import preflight
    from btx.sweeps.sharing import find_donors
    from btx.sweeps.starting import check_plans, starter
    from btx.sweeps.sweep import sweep as run_sweep
    from btx.sweeps.table import notes, sweep_table
    from btx.sweeps.variants import plan_sweep, without_trunk

    chosen = [name.strip() for name in models.split(",") if name.strip()] if models is not None else None
    planned = plan_sweep(recipe, settings or (), rng_seeds=rng_seeds, models=chosen, jobs=jobs, check=preflight)
    find_donors(share or ())  # refused before torch is imported to plan
    cost = check_plans(planned)
    if dry_run:
        overview = _overview(planned, cost, share or [])
        if as_json:
            show_json(overview)
        else:
            from btx.cli.tables import sweep_overview

            show(*sweep_overview(overview))
            if overview["set_aside"]:
                typer.echo(f"note: {overview['set_aside']}; what it says of them will be set aside")
            if settings_left_out := without_trunk(planned):
                typer.echo(f"note: no trunk is shared where these follow from the tokens; write them down: "
                           f"{settings_left_out}")  # fmt: skip
        return

    written = run_sweep(planned, starter(jobs), share=share or (), jobs=jobs,
                        log=silent if as_json else partial(print, flush=True))  # fmt: skip
    if as_json:
        show_json(written)
    else:
        show(sweep_table(written), *notes(written))
        typer.echo(f"{planned.folder}: sweep.md, sweep.svg, sweep.json")


def run_of_sweep(run_folder: Path) -> None:
    """What a sweep starts: everything that is left of one run, ending with its parent."""
    from btx.process import end_with_parent
    from btx.recipe.loading import load_recipe
    from btx.running.pipeline import run

    end_with_parent()
    run(load_recipe(str(run_folder)))


def sweep_status(folder: Path) -> list[dict[str, Any]]:
    """State of every run of a sweep's folder, as its stages' files say now."""
    from btx.run_folder.status import stage_status
    from btx.running.under_way import add_standings
    from btx.sweeps.sweep import runs_in

    rows = []
    for variant, rng_seed, path in runs_in(folder):
        of_run: list[dict[str, Any]] = []
        if is_run(path):
            run = open_run(path)
            of_run = [asdict(stage_status(run, stage)) for stage in run.graph]
            add_standings(run, of_run)
        stages = {row["stage"]: row["state"] for row in of_run}
        rows.append({"variant": variant, "rng_seed": rng_seed, "folder": str(path), "stages": stages})
    return rows


def _overview(planned: Any, plans: dict[str, dict[str, Any]], share: list[Path]) -> dict[str, Any]:
    """Runs with the state of their stages, and the training FLOPs: of all runs alone, and of what is left to make."""
    from btx.sweeps.sharing import find_donors
    from btx.sweeps.sweep import not_of_this_sweep, sweep_state

    rows = sweep_state(planned, find_donors(share))
    alone = left = 0.0
    for row in rows:
        flops = {stage["stage"]: stage["flops"] for stage in plans[row["variant"]]["stages"]}
        row["flops"] = sum(flops[name] * (1 - row["goes_on"].get(name, 0.0))
                           for name, state in row["stages"].items() if state not in ("done", "shared"))  # fmt: skip
        alone, left = alone + sum(flops.values()), left + row["flops"]
    return {"name": planned.name, "folder": str(planned.folder), "rng_seeds": planned.rng_seeds,
            "variants": {variant.label: variant.settings for variant in planned.variants}, "runs": rows,
            "flops_without_sharing": alone, "flops": left, "set_aside": not_of_this_sweep(planned)}  # fmt: skip
