"""`btx report`: one offline HTML page that shows a run: results, cost, losses, routing, tokens, diagnostics.

The page loads nothing and runs no script; a Content-Security-Policy says so. Everything read from the run folder
reaches it through jinja2's escaping, whatever a token or an answer contains. A stage the run has not reached yet is
named as missing, never an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from btx.choices.routers import ROUTERS
from btx.errors import RunFolderError
from btx.files import write_text
from btx.metrics_file import read_metrics
from btx.number_texts import (
    count_text,
    decimal_text,
    duration_text,
    flops_text,
    is_number,
    percent_text,
    signed_percent,
)
from btx.outputs import check_outputs, read_done, read_output
from btx.reporting.charts import (
    COLOURS,
    Bars,
    CostPoint,
    Curve,
    bars_chart,
    cost_chart,
    curves_chart,
    stacked_svg,
)
from btx.reporting.costs import cost_rows, cost_titles
from btx.reporting.headline import headline, paired_differences
from btx.reporting.paired_bootstrap import read_documents
from btx.reporting.results import EXPERT, report_table, results_table
from btx.reporting.shapes import Manifest, MixRecord, Results, Routing, Tokens
from btx.reporting.tokens import own_expert, token_view

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["report_table", "write_report"]

FIGURE_TITLES = {
    "cost": "Mean bits per byte against training FLOPs; a circle's area is the model's active parameters",
    "domains": "Bits per byte saved against the seed model, in percent",
}
EXAMPLES_SHOWN = 3  # right ones and wrong ones, each, per task


@dataclass(frozen=True)
class Stage:
    """One stage of the run that has left something: its `done.json` (None while it runs) and its metrics."""

    name: str
    done: dict[str, Any] | None
    metrics: list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What a run folder holds for the report; files that are missing are empty."""

    folder: Path
    recipe_text: str
    recipe: dict[str, Any]
    manifest: dict[str, Any]
    results: dict[str, Any]
    documents: dict[str, Any]
    routing: dict[str, Any]
    tokens: dict[str, Any]
    mix: dict[str, Any]
    stages: list[Stage]

    @property
    def experts(self) -> list[str]:
        """Names of the MoE model's experts, from the first file that knows them."""
        trained = [stage.name.removeprefix("train/") for stage in self.stages if stage.name.startswith("train/")]
        return self.routing.get("experts") or self.mix.get("experts") or self.tokens.get("experts") or trained

    @property
    def general(self) -> str:
        """The general domain, which is the generalist's."""
        return self.recipe.get("data", {}).get("general", "general")

    def stage(self, name: str) -> Stage:
        """The stage of this name, empty if it has left nothing."""
        return next((stage for stage in self.stages if stage.name == name), Stage(name, None, []))

    def colour(self, domain: str) -> str:
        """Palette name of a domain's expert."""
        own = own_expert(domain, self.experts, self.general)
        return "quiet" if own is None else f"c{own % COLOURS}"


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


# --- reading --------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """Read what the report shows. Missing files are fine; broken ones raise RunFolderError."""
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such run folder; `btx run RECIPE` makes one")
    recipe_file = folder / "recipe.yaml"
    recipe_text = recipe_file.read_text(encoding="utf-8") if recipe_file.exists() else ""
    try:
        recipe = yaml.safe_load(recipe_text) or {}
    except yaml.YAMLError as error:
        raise RunFolderError(f"{recipe_file}: not valid YAML ({error}); `btx run` writes it again") from error
    return Run(
        folder,
        recipe_text,
        recipe,
        manifest=read_output(folder / "manifest.json", Manifest) or {},
        results=read_output(folder / "evaluate" / "results.json", Results) or {},
        documents=read_documents(folder / "evaluate" / "documents.json") or {},
        routing=read_output(folder / "analyze" / "routing.json", Routing) or {},
        tokens=read_output(folder / "analyze" / "tokens.json", Tokens) or {},
        mix=read_output(folder / "mix" / "mix.json", MixRecord) or {},
        stages=_read_stages(folder, recipe.get("train", {}).get("domains", [])),
    )


def _read_stages(folder: Path, domains: Sequence[str]) -> list[Stage]:
    """Stages in the order of the method; data and branches in the recipe's order."""

    def below(group: str) -> list[str]:
        names = [path.name for path in (folder / group).glob("*/") if not path.name.startswith(".")]
        known = {name: number for number, name in enumerate(["tokenizer", *domains])}
        return [f"{group}/{name}" for name in sorted(names, key=lambda name: (known.get(name, len(known)), name))]

    names = [*below("data"), "seed", *below("train"), "mix", "finetune", *below("baselines"), "evaluate", "analyze"]
    there = [name for name in names if (folder / name).is_dir()]
    for name in there:
        check_outputs(folder / name, suffixes={".jsonl"})
    return [Stage(name, read_done(folder / name), read_metrics(folder / name / "metrics.jsonl")) for name in there]


# --- views ----------------------------------------------------------------------------------------------------------


def loss_charts(run: Run) -> list[dict[str, str]]:
    """Training curves as figures: losses, the load-balancing loss, the experts' load during finetuning."""
    branches = [stage for stage in run.stages if stage.name.startswith("train/")]
    seed, finetune = run.stage("seed"), run.stage("finetune")
    loads = [_load_curve(finetune, i, name) for i, name in enumerate(run.experts)]
    loss, balance = "loss (nats per token)", "load-balancing loss"
    drawn: list[tuple[str, str, list[Curve], str]] = [
        ("seed", "Seed model: training loss.", [_curve(seed, "loss", "seed model", "ink")], loss),
        (
            "experts",
            "Expert models: training loss, each on its own domain, so levels differ between domains.",
            [_curve(stage, "loss", stage.name[6:], run.colour(stage.name[6:])) for stage in branches],
            loss,
        ),
        (
            "finetune",
            "Finetuning of the mixed model: training loss on the mixture.",
            [_curve(finetune, "loss", "btx", "accent")],
            loss,
        ),
        (
            "balancing",
            "Finetuning: load-balancing loss, mean over layers; 1 is an even load.",
            [_curve(finetune, "load_balancing", "btx", "accent")],
            balance,
        ),
        ("load", "Finetuning: expert load, mean over layers.", loads, "share of routed tokens"),
    ]
    charts = []
    for name, caption, curves, y_label in drawn:
        filled = [curve for curve in curves if len(curve.x) > 1]
        if filled:
            charts.append({"svg": curves_chart(name, filled, "training tokens", y_label), "caption": caption})
    return charts


def _curve(stage: Stage, key: str, label: str, colour: str) -> Curve:
    rows = [row for row in stage.metrics if is_number(row.get(key)) and is_number(row.get("tokens"))]
    return Curve(label, colour, [row["tokens"] for row in rows], [row[key] for row in rows])


def _load_curve(stage: Stage, expert: int, label: str) -> Curve:
    rows = [row for row in stage.metrics if row.get("load") and all(expert < len(layer) for layer in row["load"])]
    means = [math.fsum(layer[expert] for layer in row["load"]) / len(row["load"]) for row in rows]
    return Curve(label, f"c{expert % COLOURS}", [row["tokens"] for row in rows], means)


def cost_figure(run: Run) -> str:
    """The figure of quality against training FLOPs; empty before two models are evaluated."""
    points = [
        CostPoint(
            name,
            _model_colour(run, name),
            # All others start from the seed model: what is compared is what came after it.
            0.0 if name == "seed" else model["flops"],
            model["mean_bits_per_byte"],
            model["active_params"],
        )
        for name, model in run.results.get("models", {}).items()
        if all(is_number(model.get(key)) for key in ("flops", "mean_bits_per_byte", "active_params"))
    ]
    return cost_chart(points) if len(points) > 1 else ""


def domains_figure(run: Run) -> str:
    """Bars of what each model saves against the seed model, per domain; empty before two models are evaluated."""
    models = run.results.get("models", {})
    seed = models.get("seed", {}).get("domains", {})
    bars = []
    for name, model in models.items():
        if name != "seed" and seed:
            paired = paired_differences(run.documents, name, "seed").get("domains", {})
            saved = (_saved(model, seed[domain], domain, paired.get(domain)) for domain in seed)
            bars.append(Bars(name, _model_colour(run, name), *zip(*saved, strict=True)))
    return bars_chart("domains", list(seed), bars) if bars else ""


def models_figures(run: Run) -> dict[str, str]:
    """SVG of the figures that compare models, `cost` and `domains`; none before two models are evaluated."""
    figures = {"cost": cost_figure(run), "domains": domains_figure(run)}
    return {name: svg for name, svg in figures.items() if svg}


def _model_colour(run: Run, name: str) -> str:
    named = {"btx": "accent", "mix": "ink", "soup": "ink", "seed": "ink"}
    return named.get(name) or run.colour(name.removeprefix(EXPERT))


def _saved(
    model: Mapping[str, Any], seed: Mapping[str, Any], domain: str, paired: Mapping[str, float] | None
) -> tuple[float | None, tuple[float, float]]:
    """Percent of the seed model's bits per byte that a model saves in a domain, and how far the interval reaches to the
    left and right of it."""
    bits, before = model.get("domains", {}).get(domain, {}).get("bits_per_byte"), seed.get("bits_per_byte")
    if not is_number(bits) or not is_number(before) or not before:
        return None, (0.0, 0.0)
    around = paired or {"low": 0.0, "difference": 0.0, "high": 0.0}
    reach = (around["high"] - around["difference"], around["difference"] - around["low"])  # fewer bits are more saved
    return 100 * (1 - bits / before), (100 * max(reach[0], 0.0) / before, 100 * max(reach[1], 0.0) / before)


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
