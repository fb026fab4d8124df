"""`btx report`: one offline HTML page that shows a run: results, cost, losses, routing, tokens, diagnostics.

The page loads nothing and runs no script but templates/report.js, known by its hash; a Content-Security-Policy says so.
Everything read from the run folder
reaches it through jinja2's escaping, whatever a token or an answer contains. A stage the run has not reached yet is
named as missing, never an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx.choices.routers import ROUTERS
from btx.files import write_bytes
from btx.number_texts import (
    count_text,
    decimal_text,
    duration_text,
    flops_text,
    is_number,
    percent_text,
    signed_percent,
)
from btx.reporting.alignment import aligned_models
from btx.reporting.costs import cost_table
from btx.reporting.drawing import COLOURS, Chart, stacked_svg
from btx.reporting.figures import loss_charts
from btx.reporting.headline import headline
from btx.reporting.page_data import page_data, script_text
from btx.reporting.paired_bootstrap import may_be_chance
from btx.reporting.readers import read_beside, script, token_readers
from btx.reporting.results import results_table
from btx.reporting.routing_figures import shift_figures
from btx.reporting.routing_view import not_measured, routing_view, shares_by, uses
from btx.reporting.run_files import Run, read_run, stale_lines
from btx.reporting.short_report import short_report
from btx.reporting.views import View, run_views

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_NAMES = 12  # of experts, in a line
EXAMPLES_SHOWN = 3  # right ones and wrong ones, each, per task


def write_report(
    run: str | Path,
    folder: str | Path | None = None,
    beside: str | Path | None = None,
    stale: Mapping[str, str] | None = None,
) -> Path:
    """Write the page of the run folder `run`, or of an analysed model's, whole or not at all, and return its path:
    `index.html` in `folder`, or in the run's `report/`.

    Beside it, for use elsewhere: `report.md`, the same in short for a model card or a repository, with the figures as
    PNG; and, once two models are evaluated, `models.svg`, the figures of all models.

    Args:
        beside: another run folder, or an analysed model's: its model's tokens stand beside those of the same text.
        stale: as for `read_run`.

    Raises RunFolderError if a folder is none or one of its files is broken, or if `beside` has no text of the run's.
    """
    run = Path(run)
    read = read_run(run, stale)
    other = None if beside is None else read_beside(read, Path(beside))
    views = run_views(read)
    drawn = {name: [panel.svg() for panel in view.chart.panels()] for name, view in views.items() if view.chart}
    html = render(read, views, drawn, other)
    target = Path(folder or run / "report") / "index.html"
    titled = [(views[name].question, svg) for name in ("cost", "domains") for svg in drawn.get(name, [])]
    if titled:
        _write(target.with_name("models.svg"), stacked_svg(titled))
    for name, view in views.items():
        if view.chart is not None:
            write_bytes(target.with_name(f"{name}.png"), view.chart.png())
    _write(target.with_name("report.md"), short_report(read, views))
    _write(target, html)
    return target


def _write(path: Path, text: str) -> None:
    """A token may be half a surrogate pair, which UTF-8 cannot hold."""
    write_bytes(path, text.encode("utf-8", "replace"))


# --- views ----------------------------------------------------------------------------------------------------------


def stage_costs(run: Run) -> dict[str, Any]:
    """Finished stages with tokens, FLOPs and wall seconds, and their sums."""
    costs = ("tokens", "flops", "wall_s")
    finished = {stage.name: stage.done for stage in run.stages if stage.done is not None}
    rows = [{"name": name, **{key: done.get(key) for key in costs}} for name, done in finished.items()]
    sums = {key: math.fsum(value for row in rows if is_number(value := row[key])) for key in costs} if rows else {}
    return {"rows": rows, "sums": sums, "running": [stage.name for stage in run.stages if stage.done is None]}


def task_examples(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Some right and some wrong answers of btx per task, with the seed model's output to the same prompt."""
    models = results.get("models", {})
    views = []
    for task, result in models.get("btx", {}).get("tasks", {}).items():
        of_seed = models.get("seed", {}).get("tasks", {}).get(task, {}).get("examples", [])
        before = {example["prompt"]: example for example in of_seed}
        examples = result.get("examples", [])
        right = [example for example in examples if example["correct"]][:EXAMPLES_SHOWN]
        wrong = [example for example in examples if not example["correct"]][:EXAMPLES_SHOWN]
        if examples:
            views.append({
                "task": task, "examples": [{**e, "seed": before.get(e["prompt"])} for e in right + wrong],
                "exact_match": result.get("exact_match"), "questions": result.get("questions"),
            })  # fmt: skip
    return views


def facts(run: Run) -> dict[str, str]:
    """What the run is, in a few words each; what is not known yet is left out."""
    btx = run.models.get("btx", {})
    sums, mix = stage_costs(run)["sums"], run.recipe.get("mix", {})
    router = ROUTERS.get(mix.get("router", ""))
    known = {
        "experts": ", ".join(run.experts) if len(run.experts) <= MOST_NAMES else str(len(run.experts)),
        "routing": router.label.format(top_k=mix.get("top_k")) if router else "",
        "MoE layers": str(run.routing.get("layers", "")),
        "parameters": f"{count_text(btx['active_params'])} active of {count_text(btx['total_params'])}" if btx else "",
        "training": f"{count_text(sums['tokens'])} tokens, {flops_text(sums['flops'])} FLOPs" if sums else "",
    }
    return {name: value for name, value in known.items() if value}


# --- page -----------------------------------------------------------------------------------------------------------


def render(run: Run, views: Mapping[str, View], drawn: Mapping[str, Sequence[str]], other: Run | None = None) -> str:
    """The page's HTML. Pure: the same run folder gives the same page.

    Args:
        drawn: view → SVG of its chart's panels, of every view that has one.
    """
    losses = loss_charts(run)
    charts = losses | {view.question: view.chart for view in views.values() if view.chart} | shift_figures(run)
    (text, text_hash), model = script(), run.folder / "finetune" / "model"
    return environment().get_template("report.html.j2").render(
        run=run, name=run.name, description=run.recipe.get("description"), facts=facts(run), views=views, drawn=drawn,
        colours=COLOURS, readers=token_readers(run, other), script=text, script_hash=text_hash,
        tasks=task_examples(run.results), model_path=json.dumps(model.as_posix(), ensure_ascii=False),
        model_exists=model.is_dir(), stale_lines=stale_lines(run), run_data=script_text(page_data(run, charts)),
        **_results(run, losses), **_routing(run),
    )  # fmt: skip


def _results(run: Run, losses: Mapping[str, Chart]) -> dict[str, Any]:
    """What the sections on training and quality show."""
    table = results_table(run.results)
    cost_titles, predicted = cost_table(run.results)
    return {
        "headline": headline(run.results, run.documents),
        "table": table,
        "gain_scale": max((abs(gain) for row in table.rows for gain in row.gains if gain), default=0.0),
        "costs": stage_costs(run),
        "cost_titles": cost_titles,
        "predicted": predicted,
        "losses": {caption: chart.svg() for caption, chart in losses.items()},
        "aligned": aligned_models(run),
    }


def _routing(run: Run) -> dict[str, Any]:
    """What the sections on the routing show."""
    by_position, by_class = (shares_by(run, key) for key in ("positions", "classes"))
    kept = run.kept
    return {
        "routing": routing_view(run),
        "top_k": run.recipe["mix"]["top_k"] if run.recipe.get("mix", {}).get("router") == "top_k" else 1,
        "own_experts": run.own_experts,
        "not_measured": not_measured(run),
        "by_position": by_position,
        "by_class": by_class,
        "largest_share": max((share for _, row in by_position + by_class for share, _ in row), default=0.0) or 1.0,
        "uses": uses(run),
        "kept": kept,
        "dropped": [name for more, fewer in pairwise(kept) for name in more["experts"] if name not in fewer["experts"]],
    }


@cache
def environment() -> Environment:
    """The templates: what they are given is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("btx.reporting", "templates"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    filters: dict[str, Callable[..., str]] = {
        "count": count_text, "flops": flops_text, "duration": duration_text, "percent": percent_text,
        "signed_percent": signed_percent, "pretty": _pretty, "decimal": decimal_text,
    }  # fmt: skip
    environment.filters.update(filters)
    environment.tests["may_be_chance"] = may_be_chance
    return environment


def _pretty(value: Any) -> str:
    """A manifest value as text: strings bare, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
