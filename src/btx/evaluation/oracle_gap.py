"""What there is to gain, known before the finetuning: how far the mix is behind each domain's best expert, and how far
the experts have moved from the seed model.

The best of seed model and experts in each domain is what a router that makes no mistake would get from models that
were not merged; the mix is behind it by its routers' mistakes and by what averaging cost. How much an expert has won
at home over the seed model, its divergence, goes with what the fused model wins over the best single expert
(Kumaresan, arXiv 2603.22755: gain = 0.82 · divergence - 2.72 percent, six models, divergences of 3 to 26 percent).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btx.data.held_out import held_out_documents, pack
from btx.evaluation.evaluate import bits_per_byte
from btx.models.device import measuring_place
from btx.models.placement import load_placed
from btx.process import Log
from btx.recipe.schema import Recipe

TOKENS = 4_000
"""Held-out tokens of a domain that every model reads, unless `evaluate.tokens` are fewer."""
SLOPE, OFFSET, DIVERGENCES = 0.82, -2.72, (3.0, 26.0)
"""Of gain on divergence, in percent, and the divergences it was seen for."""


def oracle_gap(run_folder: Path, recipe: Recipe, models: Mapping[str, Path], log: Log) -> dict[str, Any]:
    """Measure seed model, experts and mix on a little held-out text of every domain, and say what it tells.

    Args:
        run_folder: holds the prepared data.
        models: `seed`, `expert/<domain>` ... and `mix` → model folder.
        log: called with lines for the user.

    Returns:
        {"domains": {D: {"best": name, "best_bits": bits per byte, "mix_bits", "gap"}}, "mean_gap", "divergence": {D:
        percent}, "predicted_gain": percent over the best single expert}.

    Raises:
        DataError: held-out data are missing or broken.
    """
    tokens = min(TOKENS, recipe.evaluate.tokens)
    texts = {
        domain: pack(held_out_documents(run_folder, recipe, domain, tokens), recipe.data.sequence_length)
        for domain in recipe.data.domains
    }
    bits: dict[str, dict[str, float]] = {}
    for name, folder in models.items():
        model = load_placed(folder, measuring_place(recipe, log))
        bits[name] = {domain: bits_per_byte(model, packed).bits_per_byte for domain, packed in texts.items()}
    told = gap_of(bits)
    for domain, facts in told["domains"].items():
        log(f"{domain}: best {facts['best']} {facts['best_bits']:.3f} bits per byte, mix {facts['mix_bits']:.3f} "
            f"({facts['gap']:+.3f})")  # fmt: skip
    log(f"oracle gap: the mix is {told['mean_gap']:+.3f} bits per byte from each domain's best model; experts are "
        f"{_mean(told['divergence']):.1f} % better at home than the seed model, which predicts "
        f"{told['predicted_gain']:+.1f} % over the best single expert (arXiv 2603.22755)")  # fmt: skip
    return told


def gap_of(bits: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What `oracle_gap` returns, from the models' bits per byte: name → domain → bits."""
    before = {name: of_model for name, of_model in bits.items() if name != "mix"}
    domains, gaps = {}, {}
    for domain, mixed in bits["mix"].items():
        best = min(before, key=lambda name: before[name][domain])
        least = before[best][domain]
        gaps[domain] = mixed - least
        domains[domain] = {"best": best, "best_bits": least, "mix_bits": mixed, "gap": gaps[domain]}
    divergence = {
        domain: 100 * (1 - bits[expert][domain] / bits["seed"][domain])
        for domain in domains if (expert := f"expert/{domain}") in bits
    }  # fmt: skip
    return {
        "domains": domains,
        "mean_gap": _mean(gaps),
        "divergence": divergence,
        "predicted_gain": max(0.0, SLOPE * _mean(divergence) + OFFSET),
    }


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
