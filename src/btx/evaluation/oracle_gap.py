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
from btx.evaluation.bits_per_byte import bits_per_byte
from btx.models.device import measuring_place
from btx.models.placement import load_placed
from btx.process import Log
from btx.recipe.schema import Recipe
from btx.reporting.oracle import gap_of, mean_of

TOKENS = 4_000
"""Held-out tokens of a domain that every model reads, unless `evaluate.tokens` are fewer."""


def oracle_gap(run_folder: Path, recipe: Recipe, models: Mapping[str, Path], log: Log) -> dict[str, Any]:
    """Measure seed model, experts and mix on a little held-out text of every domain, and say what it tells.

    Args:
        models: `seed`, `expert/<domain>` ... and `mix` → model folder.

    Returns:
        As `btx.reporting.oracle.gap_of`.
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
        f"{mean_of(told['divergence']):.1f} % better at home than the seed model, which predicts "
        f"{told['predicted_gain']:+.1f} % over the best single expert (arXiv 2603.22755)")  # fmt: skip
    return told
