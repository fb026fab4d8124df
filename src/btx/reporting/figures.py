"""The figures of a run's training and of its models: curves, quality against cost and by domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from btx.number_texts import is_number
from btx.reporting.charts import BarPanels, Bars, CostChart, CostPoint, Curve, TrainingCurves
from btx.reporting.drawing import COLOURS
from btx.reporting.headline import paired_differences
from btx.reporting.results import EXPERT, bits_of, learning_and_keeping_means
from btx.reporting.run_files import Run, Stage
from btx.reporting.tokens import mean_load

NAMED = {"btx": "accent", "mix": "ink", "soup": "ink", "seed": "ink"}
"""Model → palette name, of those that have one of their own."""


def loss_charts(run: Run) -> dict[str, TrainingCurves]:
    """Caption → training curves: losses, the load-balancing loss, the experts' load during finetuning."""
    seed, finetune = run.stage("seed"), run.stage("finetune")
    loss = "loss (nats per token)"
    charts = {
        "Seed model: training loss.": TrainingCurves("seed", [_curve(seed, "loss", "seed model", "ink")], loss),
        "Expert models: training loss, each on its own domain, so levels differ between domains.": TrainingCurves(
            "experts", [_curve(stage, "loss", name, run.colour(name)) for stage in run.branch_stages
                        for name in [stage.name.removeprefix("train/")]], loss),
        "Finetuning of the mixed model: training loss on the mixture.": TrainingCurves(
            "finetune", [_curve(finetune, "loss", "btx", "accent")], loss),
        "Finetuning: load-balancing loss, mean over layers; 1 is an even load.": TrainingCurves(
            "balancing", [_curve(finetune, "load_balancing", "btx", "accent")], "load-balancing loss"),
        "Finetuning: expert load, mean over layers.": TrainingCurves(
            "load", [_load_curve(finetune, i, name) for i, name in enumerate(run.experts)], "share of routed tokens"),
        "Alignment on chats: loss on the answers.": TrainingCurves(
            "sft", [_curve(run.stage("align/sft"), "loss", "sft", "accent")], loss),
        "Alignment on preferences: DPO's loss; the logarithm of 2 is no preference.": TrainingCurves(
            "dpo", [_curve(run.stage("align/dpo"), "loss", "dpo", "accent")], "loss (nats per pair)"),
    }  # fmt: skip
    return {caption: replace(chart, curves=filled) for caption, chart in charts.items()
            if (filled := [curve for curve in chart.curves if len(curve.x) > 1])}  # fmt: skip


def _curve(stage: Stage, key: str, label: str, colour: str) -> Curve:
    rows = [row for row in stage.metrics if is_number(row.get(key)) and is_number(row.get("tokens"))]
    return Curve(label, colour, [row["tokens"] for row in rows], [row[key] for row in rows])


def _load_curve(stage: Stage, expert: int, label: str) -> Curve:
    rows = [row for row in stage.metrics if row.get("load") and all(expert < len(layer) for layer in row["load"])]
    means = [mean_load(row["load"], expert) for row in rows]
    return Curve(label, f"c{expert % COLOURS}", [row["tokens"] for row in rows], means)


def cost_figure(run: Run) -> CostChart | None:
    """Quality against training FLOPs; None before two models are evaluated."""
    points = [
        CostPoint(
            name,
            model_colour(run, name),
            # All others start from the seed model: what is compared is what came after it.
            0.0 if name == "seed" else model["flops"],
            model["mean_bits_per_byte"],
            model["active_params"],
        )
        for name, model in run.models.items()
        if all(is_number(model.get(key)) for key in ("flops", "mean_bits_per_byte", "active_params"))
    ]
    return CostChart(points) if len(points) > 1 else None


def domains_figure(run: Run) -> BarPanels | None:
    """Bars of what each model saves against the seed model, per domain; None before two models are evaluated."""
    bits = {name: {domain: bits_of(model, domain) for domain in model.get("domains", {})}
            for name, model in run.models.items()}  # fmt: skip
    return _saved_figure("domains", run, bits)


def learning_figure(run: Run) -> BarPanels | None:
    """Bars of what each model saves against the seed model on the branches' domains and on all other text; None where
    every domain, or none, has a branch."""
    means = {name: of_model for name, model in run.models.items()
             if (of_model := learning_and_keeping_means(model, run.branches))}  # fmt: skip
    return _saved_figure("learning", run, means)


def _saved_figure(name: str, run: Run, bits: Mapping[str, Mapping[str, float | None]]) -> BarPanels | None:
    """Bars of what each model saves against the seed model; `bits`: model → part → bits per byte."""
    seed, bars = bits.get("seed", {}), []
    for model, of_model in bits.items():
        if model != "seed" and seed:
            paired = paired_differences(run.documents, model, "seed", run.branches)
            paired = paired.get("domains", {}) if name == "domains" else paired
            saved = (_saved(of_model.get(part), before, paired.get(part)) for part, before in seed.items())
            bars.append(Bars(model, model_colour(run, model), *zip(*saved, strict=True)))
    return BarPanels(name, list(seed), bars) if bars else None


def model_colour(run: Run, name: str) -> str:
    """Palette name of a model: btx the accent, an expert model its expert's."""
    return NAMED.get(name) or run.colour(name.removeprefix(EXPERT))


def _saved(
    bits: float | None, before: float | None, paired: Mapping[str, float] | None
) -> tuple[float | None, tuple[float, float]]:
    """Percent of the seed model's bits per byte that a model saves, and how far the interval reaches to the left and
    right of it."""
    if not is_number(bits) or not is_number(before) or not before:
        return None, (0.0, 0.0)
    around = paired or {"low": 0.0, "difference": 0.0, "high": 0.0}
    reach = (around["high"] - around["difference"], around["difference"] - around["low"])  # fewer bits are more saved
    return 100 * (1 - bits / before), (100 * max(reach[0], 0.0) / before, 100 * max(reach[1], 0.0) / before)
