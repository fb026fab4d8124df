"""Numbers as text, for pages and terminals. Plain Python.

What is no finite number becomes a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

MISSING = "–"
SHORT = {"exact_match": "EM"}
LONG = {"exact_match": "exact match", "acc": "accuracy"}
Item = TypeVar("Item")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def count_text(value: Any) -> str:
    """Tokens or parameters: 1390000000 → "1.39B"."""
    if not is_number(value):
        return MISSING
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{suffix}" if abs(value) < 999.5 * size else f"{value / size:.0f}{suffix}"
    return f"{value:g}"


def ratio_text(ratio: float, border: float) -> str:
    """Tokens a parameter; of a number that nobody can mean, as of 15 for 15 trillion, how large it is.

    Args:
        border: what is less is not rounded up to it: 9.97 at a border of 10 stays 9.97.
    """
    if not 0.1 <= ratio < 1e6:
        return f"{ratio:.2g}"
    digits = 0 if ratio >= 100 else 1
    while ratio < border <= float(f"{ratio:.{digits}f}"):
        digits += 1
    return f"{ratio:,.{digits}f}"


def bytes_text(count: float) -> str:
    """Bytes: 43400000000 → "43.4 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def flops_text(value: Any) -> str:
    """FLOPs: 1234500000000 → "1.23e12"."""
    if not is_number(value):
        return MISSING
    return "0" if value == 0 else f"{value:.2e}".replace("e+", "e").replace("e0", "e")


def duration_text(seconds: Any) -> str:
    """Seconds → "12 s", "7 min 05 s" or "3 h 20 min"."""
    if not is_number(seconds):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def hours_text(hours: Any) -> str:
    """Hours as `duration_text` has them."""
    return duration_text(3600 * hours) if is_number(hours) else MISSING


def clock_text(seconds: float) -> str:
    """What is left of something, as a clock shows it: 59.6 → "1:00", 3725 → "1:02:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def percent_text(share: Any, digits: int = 1) -> str:
    """A share of 1 as percent: 0.1234 → "12.3 %"."""
    return f"{100 * share:.{digits}f} %" if is_number(share) else MISSING


def signed_percent(share: float) -> str:
    """A relative change as percent with a true minus sign: -0.079 → "−7.9 %"."""
    return f"{100 * share:+.1f} %".replace("-", "−")


def decimal_text(value: Any) -> str:
    """A number with three decimals, or a dash."""
    return f"{value:.3f}" if is_number(value) else MISSING


def evenly(count: int, at_most: int) -> list[int]:
    """Numbers from 0 to `count` - 1: all, or `at_most` of them evenly spread from the first to the last."""
    return list(range(count)) if count <= at_most else [round(i * (count - 1) / (at_most - 1)) for i in range(at_most)]


def spread(items: Sequence[Item], at_most: int) -> list[Item]:
    """All of `items`, or `at_most` of them evenly spread, the first among them."""
    count = min(at_most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def metric_of(found: Mapping[str, Any]) -> str:
    """Under which key of a task's entry its score stands."""
    return str(found.get("metric", "exact_match"))


def score_text(found: Mapping[str, Any]) -> str:
    """A task's score: percent where it is a share, else the number and what it is."""
    value, metric = found.get(metric_of(found)), metric_of(found)
    return percent_text(value) if is_share(value) else f"{metric} {decimal_text(value)}"


def is_share(value: Any) -> bool:
    """Whether `value` is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1
