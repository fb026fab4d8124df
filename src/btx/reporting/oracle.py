"""The oracle gap: how far the mix is behind the best of seed model and experts in each domain, and what the experts'
divergence from the seed model lets expect. Plain Python.

It is told twice: when the models are mixed, from a little text (mix/oracle.json, `btx.evaluation.oracle_gap`), and once
the run is evaluated, from all that its models were measured on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btx.number_texts import is_number
from btx.outputs import read_output, read_started
from btx.reporting.shapes import Oracle

SLOPE, OFFSET = 0.82, -2.72
"""Of gain on divergence, in percent (Kumaresan, arXiv 2603.22755)."""


def gap_of(bits: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The oracle gap.

    Args:
        bits: `seed`, `expert/<domain>` ... and `mix` → domain → bits per byte.

    Returns:
        {"domains": {D: {"best": name, "best_bits": bits per byte, "mix_bits", "gap"}}, "mean_gap", "divergence": {D:
        percent}, "predicted_gain": percent over the best single expert}.
    """
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
        "mean_gap": mean_of(gaps),
        "divergence": divergence,
        "predicted_gain": max(0.0, SLOPE * mean_of(divergence) + OFFSET),
    }


def mean_of(values: Mapping[str, float]) -> float:
    """The mean of the values; 0 of none."""
    return sum(values.values()) / max(1, len(values))


def read_oracle(run: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """The oracle gap of a run: of its results, else as the mix measured it unless its text has changed since; empty if
    there is neither."""
    bits = {
        name: {domain: measured.get("bits_per_byte") for domain, measured in model.get("domains", {}).items()}
        for name, model in results.get("models", {}).items()
        if name in ("seed", "mix") or name.startswith("expert/")
    }
    domains = [list(of_model) for of_model in bits.values()]
    is_whole = {"seed", "mix"} < bits.keys() and domains[0] and all(of_model == domains[0] for of_model in domains)
    if is_whole and all(is_number(value) for of_model in bits.values() for value in of_model.values()):
        return gap_of(bits)
    measured: dict[str, Any] = read_output(run / "mix" / "oracle.json", Oracle) or {}
    changed = [domain for domain, inputs in measured.get("text", {}).items() if _has_changed(run, domain, inputs)]
    return {} if changed else measured


def _has_changed(run: Path, domain: str, inputs: str) -> bool:
    """Whether a domain's data are others than those that were read; data that stayed elsewhere are what they were."""
    begun = read_started(run / "data" / domain)
    return begun is not None and begun["inputs"] != inputs
