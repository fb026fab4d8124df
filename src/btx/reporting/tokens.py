"""Tokens with the experts they use, as the report's readers show them, and texts that several models route.

Token texts reach the page through jinja2's escaping, or in JSON through `script_text`, alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from btx.reporting.drawing import COLOURS

PART = 1000
"""Tokens of a document shown at once; a longer one is cut into parts."""
SAME_TEXT = 40
"""Characters at the start of two texts that make them the same text, cut at different places."""


@dataclass(frozen=True)
class Token:
    """A token as it is written into the page: its text as shown, and its classes: `a0` ... for the expert with the
    larger gate weight and `b0` ... for the other (palette numbers), and the place of the in-domain expert."""

    text: str
    classes: str


@dataclass(frozen=True)
class RoutedText:
    """A text as one model routes it: experts and gates of each token in every layer, the largest gate first."""

    model: str
    tokens: list[str]
    experts: list[list[list[int]]]
    gates: list[list[list[float]]]
    bits: dict[str, list[float]] = field(default_factory=dict)
    """Model → bits of every token."""

    @property
    def starts(self) -> list[int]:
        """Character at which each token starts, and where the text ends."""
        return list(accumulate((len(text) for text in self.tokens), initial=0))

    def part(self, first: int, end: int) -> RoutedText:
        """Tokens `first` to `end`."""
        return RoutedText(
            self.model, self.tokens[first:end], self.experts[first:end], self.gates[first:end],
            {model: bits[first:end] for model, bits in self.bits.items()},
        )  # fmt: skip

    def token(self, number: int, layer: int, own: int | None) -> Token:
        """One token as the page shows it, coloured by a layer."""
        chosen = self.experts[number][layer]
        # A Top-1 router's only expert takes both halves.
        first, second = (chosen[0], chosen[min(1, len(chosen) - 1)]) if chosen else (0, 0)
        place = " first" if own == first else " second" if own == second else ""
        return Token(self.tokens[number].replace("\n", "↵\n"), f"a{first % COLOURS} b{second % COLOURS}{place}")

    def data(self) -> dict[str, Any]:
        """What the page's script reads: of each layer the number of experts a token, the experts of all tokens one
        after the other, and their gate weights in hundredths."""
        layers = range(len(self.experts[0]) if self.experts else 0)
        return {
            "tokens": self.tokens,
            "k": [len(self.experts[0][layer]) for layer in layers],
            "experts": [[expert for token in self.experts for expert in token[layer]] for layer in layers],
            "gates": [[round(100 * gate) for token in self.gates for gate in token[layer]] for layer in layers],
            "bits": {model: [round(each, 2) for each in bits] for model, bits in self.bits.items()},
        }


def routed_text(model: str, document: Mapping[str, Any]) -> RoutedText:
    """A document or answer of tokens.json; of each layer the experts in the order of their gates."""
    experts, gates = list(document["experts"]), list(document["gates"])
    for t, gates_LK in enumerate(gates):
        if any(gates_K != sorted(gates_K, reverse=True) for gates_K in gates_LK):
            ranked_LK = [
                sorted(zip(gates_K, experts_K, strict=True), reverse=True)
                for gates_K, experts_K in zip(gates_LK, experts[t], strict=True)
            ]
            experts[t] = [[expert for _, expert in ranked] for ranked in ranked_LK]
            gates[t] = [[gate for gate, _ in ranked] for ranked in ranked_LK]
    return RoutedText(model, list(document["tokens"]), experts, gates, dict(document.get("losses", {})))


def same_text(one: RoutedText, other: RoutedText) -> bool:
    """Whether two texts start alike for as long as both go on: tokenizers cut the same document elsewhere."""
    a, b = "".join(one.tokens), "".join(other.tokens)
    both = min(len(a), len(b))
    return both >= min(SAME_TEXT, max(len(a), len(b))) and a[:both] == b[:both]


def parts(texts: Sequence[RoutedText]) -> list[list[RoutedText]]:
    """The same text by several models, cut into parts of `PART` tokens of the first; a token of another model belongs
    to the part in which it starts."""
    starts = texts[0].starts
    firsts = range(0, len(texts[0].tokens), PART)
    ends = [*(starts[first] for first in firsts[1:]), max(text.starts[-1] for text in texts) + 1]
    cut = []
    for first, start, end in zip(firsts, [starts[first] for first in firsts], ends, strict=True):
        among = [[t for t, at in enumerate(text.starts[:-1]) if start <= at < end] for text in texts[1:]]
        others = [text.part(ts[0], ts[-1] + 1) for text, ts in zip(texts[1:], among, strict=True) if ts]
        cut.append([texts[0].part(first, first + PART), *others])
    return cut


def mean_load(layers: Sequence[Sequence[float]], expert: int) -> float:
    """An expert's share of the load, mean over layers."""
    return math.fsum(layer[expert] for layer in layers) / len(layers)


def own_expert(domain: str, experts: Sequence[str], general: str | None) -> int | None:
    """Index of a domain's own expert; the general domain's is the generalist."""
    name = "generalist" if domain == general and domain not in experts else domain
    return list(experts).index(name) if name in experts else None


def own_experts(domains: Iterable[str], experts: Sequence[str], general: str | None) -> dict[str, int]:
    """Domain → index of its own expert, of the domains that have one."""
    return {domain: e for domain in domains if (e := own_expert(domain, experts, general)) is not None}
