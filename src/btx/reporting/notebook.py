"""Tables and the figure of costs as a piece of HTML for a notebook's cell. Plain Python.

It brings the page's colours with it, light and dark, and touches nothing outside itself. Everything read from files
goes through jinja2's escaping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx.number_texts import MISSING
from btx.reporting.drawing import colour_rules
from btx.reporting.figures import cost_figure
from btx.reporting.report import environment
from btx.reporting.results import Cell, results_table
from btx.reporting.run_files import Run, read_run

COSTS = ("tokens", "FLOPs", "time", "active", "total")


@dataclass(frozen=True)
class Table:
    """A table to show: its first column names the rows."""

    titles: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    caption: str = ""


def table_html(table: Table, *, title: str = "", figure: str = "") -> str:
    """A table, and below it an `<svg>` of `btx.reporting.drawing`."""
    rules = colour_rules().replace(":root", ".btx")
    return environment().get_template("notebook.html.j2").render(table=table, title=title, figure=figure, rules=rules)


def run_html(folder: Path, stale: Mapping[str, str] | None = None) -> str:
    """A run: its table of results and the circles of costs; before it is evaluated, how far it is. `stale` as for
    `read_run`."""
    run = read_run(folder, stale)
    name = str(run.recipe.get("name") or folder.name)
    if "evaluate" in run.stale:
        name += f": evaluate is stale ({run.stale['evaluate']})"
    if not run.models:
        return table_html(_progress_table(run), title=f"{name}: not evaluated yet")
    chart = cost_figure(run)
    return table_html(results_of(run.results), title=name, figure=chart.svg() if chart else "")


def results_of(results: Mapping[str, Any]) -> Table:
    """The report's table of results."""
    table = results_table(results)
    rows = [(row.name, [*row.quality, *row.costs]) for row in table.rows]
    return Table([*table.quality_titles(f"{task} (task)" for task in table.tasks), *COSTS], rows,
                 "Bits per byte, lower is better; tasks: share of right answers; tokens, FLOPs and time of training "
                 "after the seed model; active and total parameters" + table.meanings)  # fmt: skip


def _progress_table(run: Run) -> Table:
    """Stages that have left something, with the steps they have done."""
    rows = []
    for stage in run.stages:
        last = stage.metrics[-1] if stage.metrics else {}
        steps = f"{last['step']}/{last['steps']}" if "steps" in last else MISSING
        loss = f"{last['loss']:.3f}" if "loss" in last else MISSING
        rows.append((stage.name, [Cell("done" if stage.done else "begun"), Cell(steps), Cell(loss)]))
    return Table(["state", "steps", "loss"], rows)
