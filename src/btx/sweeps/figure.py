"""sweep.svg: a sweep's models as in the paper's figure 2, with error bars over rng seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from btx.reporting.charts import BarPanels, Bars, CostChart, CostPoint
from btx.reporting.drawing import COLOURS, stacked_svg
from btx.reporting.figures import NAMED
from btx.reporting.results import domain_title
from btx.sweeps.table import ALL, Stat, SweepRow, branches_vary, paired, sweep_rows


def sweep_figure(written: Mapping[str, Any]) -> str:
    """Mean bits per byte against training FLOPs, and every model's gain per domain and in the means, as the text of
    one SVG file."""
    rows = sweep_rows(written)
    colours = {variant: f"c{number % COLOURS}" for number, variant in enumerate(written["variants"])}
    labels = [_label(row, rows) for row in rows]
    points = [
        CostPoint(label, _colour(row, colours), 0.0 if row.model == "seed" else row.flops["mean"], row.mean["mean"],
                  row.active_params["mean"], row.mean["stderr"] or 0.0)
        for label, row in zip(labels, rows, strict=True) if row.mean and row.flops and row.active_params
    ]  # fmt: skip
    charts = []
    if points:
        charts.append(("Mean bits per byte against training FLOPs; a circle's area is the model's active parameters",
                       CostChart(points, "sweep-cost").svg()))  # fmt: skip
    seeds = {row.variant: row for row in rows if row.model == "seed"}
    trained = [(label, row, seeds.get(row.variant) or seeds.get(ALL)) for label, row in zip(labels, rows, strict=True)
               if row.model != "seed"]  # fmt: skip
    if seeds and trained:
        columns = _columns(list(seeds.values()), written)
        bars = [Bars(label, _colour(row, colours), *_gains(row, seed, columns)) for label, row, seed in trained if seed]
        charts.append(("Bits per byte saved against the variant's seed model, in percent" if ALL not in seeds else
                       "Bits per byte saved against the seed model, in percent",
                       BarPanels("sweep-domains", columns, bars).svg()))  # fmt: skip
    return stacked_svg(charts)


def _columns(seeds: Sequence[SweepRow], written: Mapping[str, Any]) -> list[str]:
    """Titles of what seed models are measured on; learning and keeping where they are of the same domains in all
    variants."""
    without = ("learning", "keeping") if branches_vary(written) else ()
    return list(dict.fromkeys(title for seed in seeds for title, stat in _bits(seed).items()
                              if stat is not None and title not in without))  # fmt: skip


def _bits(row: SweepRow) -> dict[str, Stat | None]:
    """Title of a column → bits per byte: of the domains, and their means."""
    bits: dict[str, Stat | None] = {domain_title(domain): stat for domain, stat in row.domains.items()}
    return bits | {"mean": row.mean, "learning": row.learning, "keeping": row.keeping}


def _gains(
    row: SweepRow, seed: SweepRow, columns: Sequence[str]
) -> tuple[list[float | None], list[tuple[float, float]]]:
    """Percent of the seed model's bits per byte that are saved, column by column, and standard errors."""
    ours, before = _bits(row), _bits(seed)
    gains = [paired(ours.get(title), row.rng_seeds, before.get(title), seed.rng_seeds, lambda a, b: 100 * (1 - a / b))
             for title in columns]  # fmt: skip
    means = [None if gain is None else float(gain["mean"]) for gain in gains]
    errors = [0.0 if gain is None else gain["stderr"] or 0.0 for gain in gains]
    return means, [(error, error) for error in errors]


def _label(row: SweepRow, rows: Sequence[SweepRow]) -> str:
    """The model's name, the variant's, or both: what tells this row from the others."""
    if len({other.variant for other in rows} - {ALL}) < 2 or row.variant == ALL:
        return row.model
    return row.variant if len({other.model for other in rows}) == 1 else f"{row.model}, {row.variant}"


def _colour(row: SweepRow, variants: Mapping[str, str]) -> str:
    if row.variant != ALL and len(variants) > 1:
        return variants[row.variant]
    return NAMED.get(row.model, "quiet")
