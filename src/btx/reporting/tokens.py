"""The report's token view: which experts every token of a few documents uses, layer by layer, without a script.

A token carries two classes per shown layer, `a{layer}-{expert}` for the larger gate weight and `b{layer}-{expert}` for
the other (numbers only). Radio buttons choose the layer, and CSS colours the token with the two experts' colours.
Token texts reach the page through jinja2's escaping alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

# A page under 2 MB: a token costs about 30 bytes a shown layer for its colour and its tooltip.
MAX_LAYERS = 8
MAX_TOKENS = 3600
MAX_LEGEND = 6  # experts; with more, the pairs follow from the single experts' colours


@dataclass(frozen=True)
class Token:
    """One token: its text as shown, its classes, the tooltip with gate weights."""

    text: str
    classes: str
    tooltip: str


@dataclass(frozen=True)
class Example:
    """One document: its domain, the in-domain expert's index (None if there is none), its tokens."""

    domain: str
    own: int | None
    tokens: list[Token]
    cut: int


@dataclass(frozen=True)
class TokenView:
    """All examples, the layers shown, and the pairs of experts for the legend (none for a Top-1 router)."""

    experts: list[str]
    layers: list[int]
    total_layers: int
    examples: list[Example]
    legend: list[tuple[int, int]]


def token_view(tokens: Mapping[str, Any], general: str | None) -> TokenView | None:
    """`analyze/tokens.json` made ready for the page; None without examples. `general` is the generalist's domain."""
    examples = tokens.get("examples", [])
    if not examples:
        return None
    experts = list(tokens["experts"])
    layers = shown_layers(int(tokens["layers"]), MAX_LAYERS)
    budget = MAX_TOKENS // len(examples)
    views = [_example(example, experts, layers, budget, general) for example in examples]
    top_1 = all(len(layer) == 1 for example in examples for token in example["experts"][:1] for layer in token)
    legend = [] if top_1 or len(experts) > MAX_LEGEND else list(combinations(range(len(experts)), 2))
    return TokenView(experts, layers, int(tokens["layers"]), views, legend)


def shown_layers(layers: int, at_most: int) -> list[int]:
    """All layers, or `at_most` of them evenly spread from the first to the last."""
    if layers <= at_most:
        return list(range(layers))
    return [round(i * (layers - 1) / (at_most - 1)) for i in range(at_most)]


def own_expert(domain: str, experts: Sequence[str], general: str | None) -> int | None:
    """Index of a domain's own expert; the general domain's is the generalist."""
    name = "generalist" if domain == general and domain not in experts else domain
    return list(experts).index(name) if name in experts else None


def _example(
    example: Mapping[str, Any], experts: Sequence[str], layers: Sequence[int], budget: int, general: str | None
) -> Example:
    rows = list(zip(example["tokens"], example["experts"], example["gates"], strict=True))
    tokens = [_token(text, chosen, gates, experts, layers) for text, chosen, gates in rows[:budget]]
    return Example(
        example["domain"], own_expert(example["domain"], experts, general), tokens, max(0, len(rows) - budget)
    )


def _token(
    text: str,
    chosen: Sequence[Sequence[int]],
    gates: Sequence[Sequence[float]],
    experts: Sequence[str],
    layers: Sequence[int],
) -> Token:
    classes, lines = [], []
    for layer in layers:
        ranked = sorted(zip(gates[layer], chosen[layer], strict=True), reverse=True)[:2]
        # A Top-1 router's only expert takes both halves.
        classes.append(f"a{layer}-{int(ranked[0][1])} b{layer}-{int(ranked[-1][1])}")
        lines.append(f"{layer}: " + " + ".join(f"{experts[expert]} {gate:.2f}" for gate, expert in ranked))
    return Token(text.replace("\n", "↵\n"), " ".join(classes), "\n".join(lines))
