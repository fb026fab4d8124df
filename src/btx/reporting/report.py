"""`btx report`: one offline HTML page that shows a run: results, cost, losses, routing, tokens, diagnostics.

The page loads nothing and runs no script; a Content-Security-Policy says so. Everything read from the run folder
reaches it through jinja2's escaping, whatever a token or an answer contains. A stage the run has not reached yet is
named as missing, never an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx.choices.routers import ROUTERS
from btx.files import write_text
from btx.number_texts import (
    count_text,
    decimal_text,
    duration_text,
    flops_text,
    is_number,
    percent_text,
    signed_percent,
)
from btx.reporting.charts import (
    COLOURS,
    stacked_svg,
)
from btx.reporting.costs import cost_rows, cost_titles
from btx.reporting.figures import loss_charts, models_figures
from btx.reporting.headline import headline
from btx.reporting.results import report_table, results_table
from btx.reporting.run_files import Run, read_run
from btx.reporting.tokens import own_expert, token_view

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["report_table", "write_report"]

FIGURE_TITLES = {
    "cost": "Mean bits per byte against training FLOPs; a circle's area is the model's active parameters",
    "domains": "Bits per byte saved against the seed model, in percent",
}
EXAMPLES_SHOWN = 3  # right ones and wrong ones, each, per task


def write_report(run: Path, folder: Path | None = None) -> Path:
    """Write the page of the run folder `run`, whole or not at all, and return its path: `index.html` in `folder`, or in
    the run's `report/`.

    Beside it, `models.svg` holds the figures of all models, for use elsewhere; it is written once two are evaluated.

    Raises RunFolderError if `run` is no folder or one of its files is broken.
    """
    read = read_run(run)
    figures = models_figures(read)
    html = render(read, figures)
    target = (folder or run / "report") / "index.html"
    if figures:
        titled = [(FIGURE_TITLES[name], svg) for name, svg in figures.items()]
        write_text(target.with_name("models.svg"), stacked_svg(titled).encode("utf-8", "replace").decode("utf-8"))
    # A token may be half a surrogate pair, which UTF-8 cannot hold.
    write_text(target, html.encode("utf-8", "replace").decode("utf-8"))
    return target


# --- views ----------------------------------------------------------------------------------------------------------


def stage_costs(run: Run) -> dict[str, Any]:
    """Finished stages with tokens, FLOPs and wall seconds, and their sums."""
    rows = [
        {"name": stage.name, **{key: stage.done.get(key) for key in ("tokens", "flops", "wall_s")}}
        for stage in run.stages
        if stage.done is not None
    ]
    sums = (
        {key: math.fsum(value for row in rows if is_number(value := row[key])) for key in rows[0] if key != "name"}
        if rows
        else {}
    )
    return {"rows": rows, "sums": sums, "running": [stage.name for stage in run.stages if stage.done is None]}


def routing_view(run: Run) -> dict[str, Any] | None:
    """Load and pairs of every domain, with the in-domain expert's mean load."""
    domains = run.routing.get("domains")
    if not domains:
        return None
    experts = run.routing["experts"]
    views = []
    for name, domain in domains.items():
        own = own_expert(name, experts, run.general)
        load, pairs = domain["load"], domain.get("pairs", {})
        views.append(
            {
                "name": name,
                "own": own,
                "load": load,
                "own_load": None if own is None else math.fsum(layer[own] for layer in load) / len(load),
                "pairs": [
                    (pair, [experts.index(expert) for expert in pair.split("+")], shares)
                    for pair, shares in pairs.items()
                ],
            }
        )
    return {
        "experts": experts,
        "layers": run.routing["layers"],
        "domains": views,
        "largest": max(share for view in views for layer in view["load"] for share in layer) or 1.0,
        "largest_pair": max((s for view in views for *_, shares in view["pairs"] for s in shares), default=0) or 1.0,
        "dead": [(layer, experts[expert]) for layer, expert in run.routing.get("dead", [])],
    }


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
            views.append(
                {
                    "task": task,
                    "examples": [{**e, "seed": before.get(e["prompt"])} for e in right + wrong],
                    "exact_match": result.get("exact_match"),
                    "questions": result.get("questions"),
                }
            )
    return views


def mix_diagnostics(mix: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per group of shared weights: mean cosine between the task vectors, and the norm ratio."""
    return [
        {"name": name, "mean": group.get("mean_cosine"), "norm": group.get("mean_norm_ratio")}
        for name, group in mix.get("diagnostics", {}).items()
    ]


def routing_text(mix: Mapping[str, Any]) -> str:
    """The router of a recipe's `mix` section in a word or two; nothing if it is not there."""
    kind = ROUTERS.get(mix.get("router", ""))
    return kind.label.format(top_k=mix.get("top_k")) if kind else ""


def facts(run: Run) -> dict[str, str]:
    """What the run is, in a few words each; what is not known yet is left out."""
    btx = run.results.get("models", {}).get("btx", {})
    sums = stage_costs(run)["sums"]
    known = {
        "experts": ", ".join(run.experts),
        "routing": routing_text(run.recipe.get("mix", {})),
        "MoE layers": str(run.routing.get("layers", "")),
        "parameters": f"{count_text(btx['active_params'])} active of {count_text(btx['total_params'])}" if btx else "",
        "training": f"{count_text(sums['tokens'])} tokens, {flops_text(sums['flops'])} FLOPs" if sums else "",
    }
    return {name: value for name, value in known.items() if value}


# --- page -----------------------------------------------------------------------------------------------------------


def render(run: Run, figures: Mapping[str, str]) -> str:
    """The page's HTML, with `models_figures`. Pure: the same run folder gives the same page."""
    model = run.folder / "finetune" / "model"
    table = results_table(run.results)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            name=str(run.recipe.get("name") or run.folder.name),
            description=run.recipe.get("description"),
            facts=facts(run),
            top_k=run.recipe["mix"]["top_k"] if run.recipe.get("mix", {}).get("router") == "top_k" else 1,
            headline=headline(run.results, run.documents),
            table=table,
            gain_scale=max((abs(gain) for row in table.rows for gain in row.gains if gain), default=0.0),
            costs=stage_costs(run),
            predicted=cost_rows(run.results),
            cost_titles=cost_titles(run.results),
            cost_figure=figures.get("cost", ""),
            domains_figure=figures.get("domains", ""),
            losses=loss_charts(run),
            routing=routing_view(run),
            tokens=token_view(run.tokens, run.general) if run.tokens else None,
            tasks=task_examples(run.results),
            diagnostics=mix_diagnostics(run.mix),
            model_path=json.dumps(model.as_posix(), ensure_ascii=False),
            model_exists=model.is_dir(),
            colours=COLOURS,
        )
    )


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("btx.reporting", "templates"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    filters: dict[str, Callable[..., str]] = {
        "count": count_text,
        "flops": flops_text,
        "duration": duration_text,
        "percent": percent_text,
        "signed_percent": signed_percent,
        "pretty": _pretty,
        "decimal": decimal_text,
    }
    environment.filters.update(filters)
    return environment


def _pretty(value: Any) -> str:
    """A manifest value as text: strings bare, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
