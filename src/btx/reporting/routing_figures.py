"""The figures of a model's routing: after a change of domain, with fewer experts, layer by layer, after alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from btx.reporting.charts import Curve, HeatMap, Lines
from btx.reporting.drawing import COLOURS
from btx.reporting.run_files import Run


def lag_figure(run: Run) -> Lines | None:
    """Load of the old and the new domain's expert around a change of domain; None where it was not measured."""
    lag = run.routing.get("lag")
    if not lag or len(lag["positions"]) < 2:
        return None
    curves = [Curve("new domain's", "accent", lag["positions"], lag["new"]),
              Curve("old domain's", "ink", lag["positions"], lag["old"])]  # fmt: skip
    return Lines("lag", curves, "tokens since the change of domain", "share of the load", mark=0.0, from_zero=True)


def kept_figure(run: Run) -> Lines | None:
    """Bits per byte against the number of experts kept, per domain and in the mean; None where it was not measured."""
    kept = run.kept[::-1]
    if len(kept) < 2:
        return None
    counts = [len(point["experts"]) for point in kept]
    domains = [name for name in kept[0]["domains"] if all(name in point["domains"] for point in kept)]
    curves = [Curve("mean", "ink", counts, [point["mean"] for point in kept])]
    curves += [
        Curve(name, _colour(run, name, number), counts, [point["domains"][name] for point in kept])
        for number, name in enumerate(domains) if len(domains) > 1
    ]  # fmt: skip
    return Lines("kept", curves, "experts kept", "bits per byte (lower is better)")


def own_load_figure(run: Run) -> Lines | None:
    """Load of every domain's own expert, layer by layer, with its interval where there is one; None where no domain
    has an expert of its own, or a single layer."""
    curves = []
    for domain, expert in run.own_experts.items():
        load, intervals = run.routing["domains"][domain]["load"], run.statistics.get("load", {}).get(domain, [])
        if len(load) > 1:
            curves.append(Curve(domain, run.colour(domain), range(len(load)), [layer[expert] for layer in load],
                                *_bounds([layer[expert] for layer in intervals])))  # fmt: skip
    if not curves:
        return None
    even = 1 / len(run.routing["experts"])
    return Lines("own-load", curves, "layer", "load of the domain's own expert", level=even, from_zero=True)


def specialisation_figure(run: Run) -> Lines | None:
    """What the first expert tells of the domain, layer by layer; None where it was not measured, or a single layer."""
    intervals = run.statistics.get("specialisation", [])
    if len(intervals) < 2:
        return None
    curve = Curve(
        "specialisation", "accent", range(len(intervals)), [layer["value"] for layer in intervals], *_bounds(intervals)
    )
    return Lines("specialisation", [curve], "layer", "specialisation (0 to 1)", from_zero=True)


def similarity_figure(run: Run) -> HeatMap | None:
    """What two layers' first experts tell of each other; None where it was not measured, or a single layer."""
    similarity = run.statistics.get("similarity", [])
    return HeatMap("similarity", similarity, "layer") if len(similarity) > 1 else None


def shift_figures(run: Run) -> dict[str, Lines]:
    """Aligned model → share of each domain's tokens that go to another first expert than before, layer by layer."""
    charts = {}
    for model, domains in run.aligned.get("models", {}).items():
        curves = [Curve(domain, run.colour(domain), range(len(shift["moved"])), shift["moved"])
                  for domain, shift in domains.items() if len(shift["moved"]) > 1]  # fmt: skip
        if curves:
            charts[model] = Lines(f"shift-{model}", curves, "layer", "tokens with another first expert", from_zero=True)
    return charts


def _colour(run: Run, domain: str, number: int) -> str:
    """The colour of the domain's expert; of a model whose experts are nobody's, one by number."""
    return f"c{number % COLOURS}" if run.of_model else run.colour(domain)


def _bounds(intervals: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    return [one["low"] for one in intervals], [one["high"] for one in intervals]
