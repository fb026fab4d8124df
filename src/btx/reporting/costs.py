"""The report's table of costs: what was measured and what `btx plan` predicted, model by model. Plain Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from btx.number_texts import MISSING, count_text, flops_text, hours_text, is_number, percent_text
from btx.reporting.results import Cell

TITLES = ("tokens", "FLOPs", "peak memory", "machine time", "FLOPs to btx's", "machine time to btx's",
          "inference FLOPs a token")  # fmt: skip
MFU = "MFU of the last training"
"""One more title, where a device's peak was known."""


def cost_table(results: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Titles of the columns, and (model, its cells) of every model of results.json that has a prediction.

    Planned memory is that of weights, gradients, optimiser state and activations; what is measured holds the
    interpreter and its libraries too. Planned machine time is the planned FLOPs at the speed that the run's first
    training stage had, so that one is right by definition.
    """
    models = results.get("models", {})
    mfu = any(model.get("mfu") is not None for model in models.values())
    rows = [
        (name, [*_cells(model), *([Cell(percent_text(model.get("mfu")))] if mfu else [])])
        for name, model in models.items() if model.get("predicted")
    ]  # fmt: skip
    return [*TITLES, *([MFU] if mfu else [])], rows


def _cells(model: Mapping[str, Any]) -> list[Cell]:
    planned, matched = model["predicted"], model.get("matched", {})

    def beside_plan(text: Callable[[Any], str], key: str, planned_key: str = "") -> Cell:
        return Cell(text(model.get(key)), f"planned {text(planned.get(planned_key or key))}", exact=str(model.get(key)))

    return [
        beside_plan(count_text, "tokens"),
        beside_plan(flops_text, "flops"),
        beside_plan(memory_text, "peak_memory_bytes", "memory_bytes"),
        beside_plan(hours_text, "machine_hours"),
        Cell(_times(matched.get("flops_ratio"))),
        Cell(_times(matched.get("hours_ratio"))),
        Cell(flops_text(model.get("inference_flops_per_token"))),
    ]


def memory_text(value: Any) -> str:
    """Bytes in MB or GB (powers of 1000)."""
    if not is_number(value) or value <= 0:
        return MISSING
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def _times(ratio: Any) -> str:
    return f"{ratio:.2f}" if is_number(ratio) else MISSING
