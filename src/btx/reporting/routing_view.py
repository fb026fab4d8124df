"""Tables of a model's routing, made ready for the page: load and pairs, before and after, what experts are used for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from btx.number_texts import evenly, percent_text
from btx.reporting.run_files import Run
from btx.reporting.tokens import mean_load

MOST_PAIRS = 10
"""Pairs of experts shown of a domain: a page has room for no more columns."""
MOST_TITLES = 2000
"""Shares of a domain that say more where one points: the page stays under 2 MB."""
MOST_LAYERS = 8
"""Layers named where one points at a share."""


def routing_view(run: Run) -> dict[str, Any] | None:
    """Load and pairs of every domain, with the in-domain expert's mean load; None before the analysis."""
    domains = run.routing.get("domains")
    if not domains:
        return None
    experts = run.routing["experts"]
    in_domain = run.own_experts
    views = [
        {
            "name": name,
            "own": in_domain.get(name),
            "load": domain["load"],
            "own_load": mean_load(domain["load"], in_domain[name]) if name in in_domain else None,
            "titles": _titles(run, name, domain["load"]),
            "pairs": [(pair, [experts.index(expert) for expert in pair.split("+")], shares)
                      for pair, shares in most_frequent(domain.get("pairs", {})).items()],
        }
        for name, domain in domains.items()
    ]  # fmt: skip
    pairs = max(len(domain.get("pairs", {})) for domain in domains.values())
    return {
        "experts": experts,
        "layers": run.routing["layers"],
        "domains": views,
        "largest": max(share for view in views for layer in view["load"] for share in layer) or 1.0,
        "largest_pair": max((s for view in views for *_, shares in view["pairs"] for s in shares), default=0) or 1.0,
        "pairs_cut": pairs if pairs > MOST_PAIRS else 0,
        "dead": [(layer, experts[expert]) for layer, expert in run.routing.get("dead", [])],
        "before_after": _before_after(run, in_domain),
    }


def most_frequent(pairs: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The pairs that most tokens have, in the order of the file."""
    chosen = sorted(pairs, key=lambda pair: -math.fsum(pairs[pair]))[:MOST_PAIRS]
    return {pair: shares for pair, shares in pairs.items() if pair in chosen}


def shares_by(run: Run, key: str) -> list[tuple[str, list[tuple[float, str]]]]:
    """Rows of `positions` or `classes`: name, and per expert its share (mean over layers) with what it is in single
    layers and their 95 % intervals, as text."""
    rows = []
    for name, layers in run.statistics.get(key, {}).items():
        bounds = run.statistics.get("bounds", {}).get(key, {}).get(name, [])
        if layers:
            rows.append((name, [_share(run.experts[e], e, layers, bounds) for e in range(len(layers[0]))]))
    return rows


def _share(
    name: str, expert: int, layers: Sequence[Sequence[float]], bounds: Sequence[Sequence[Sequence[float]]]
) -> tuple[float, str]:
    lines = [name]
    for layer in evenly(len(layers), MOST_LAYERS):
        around = " to ".join(percent_text(bound) for bound in bounds[layer][expert]) if bounds else ""
        lines.append(f"layer {layer}: {percent_text(layers[layer][expert])}" + (f" (95 %: {around})" if around else ""))
    return mean_load(layers, expert), "\n".join(lines)


def uses(run: Run) -> list[dict[str, Any]]:
    """What every expert is used for, kinds of tokens that it gets none of left out; empty where it was not measured."""
    experts = run.routing.get("experts", [])
    return [
        {
            "expert": expert,
            "number": experts.index(expert) if expert in experts else number,
            "classes": [(name, share) for name, share in use["classes"].items() if share >= 0.005],
            "tokens": [(with_signs(text), share, count) for text, share, count in use["tokens"]],
        }
        for number, (expert, use) in enumerate((run.routing.get("used_for") or {}).items())
    ]


def with_signs(token: str) -> str:
    """A token's text with its spaces and line ends as signs."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


def not_measured(run: Run) -> list[str]:
    """What a later or a fuller analysis would show besides."""
    asked = {
        "statistics": "statistics with intervals",
        "used_for": "what each expert is used for",
        "lag": "how fast routing follows a change of domain",
        "kept": "quality with fewer experts",
    }
    return [what for key, what in asked.items() if not run.routing.get(key)]


def _titles(run: Run, domain: str, load: Sequence[Sequence[float]]) -> list[list[str]]:
    """Each share with its expert, and its 95 % interval where there is one, layer by layer; of too many shares none."""
    experts, intervals = run.routing["experts"], run.statistics.get("load", {}).get(domain, [])
    if len(experts) * len(load) > MOST_TITLES:
        return [[""] * len(experts)] * len(load)
    return [
        [
            f"{expert}: {percent_text(share)}"
            + (f", 95 %: {percent_text(around['low'])} to {percent_text(around['high'])}" if around else "")
            for expert, share, around in zip_longest(experts, layer, intervals[number] if intervals else [])
        ]
        for number, layer in enumerate(load)
    ]


def _before_after(run: Run, own: Mapping[str, int]) -> list[tuple[str, dict[str, float]]]:
    """(model, domain → mean load of the own expert) of every model with these experts; empty with fewer than two."""
    loads: Mapping[str, Any] = run.routing.get("loads") or {}
    rows = [
        (model, {domain: mean_load(domains[domain], own[domain]) for domain in own if domain in domains})
        for model, domains in loads.items()
    ]
    complete = [(model, shares) for model, shares in rows if shares and len(shares) == len(own)]
    return complete if len(complete) > 1 else []
