"""Loss spikes: steps that stand out from those before them.

A step is a spike if its loss is more than 1.2 times the median of the last 100 steps, or its gradient norm (before
clipping) more than 5 times its median; and in either case more than their mean and six standard deviations, as small
batches of unlike texts are no spikes (OLMo-core's SkipStepOptimizer has the six, over 128 steps). The first eight steps
are never one. Among the steps before the next one a spike counts as the largest value that would have been none: so it
does not hide the next, and a loss that stays high is in time the usual one. A loss or gradient norm that is NaN or
infinite is a spike too, at any step, and counts for nothing among the steps before the next.

What came before is read from metrics.jsonl, so a resumed training finds the same spikes as one that went through.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

WINDOW, LEAST = 100, 8
DEVIATIONS = 6.0
MOST_IN_A_ROW = 10
"""Steps without numbers, one after the other, after which leaving them out has no use: the weights give no others."""
FACTORS = {"loss": 1.2, "grad_norm": 5.0}
NAMES = {"loss": "loss", "grad_norm": "gradient norm"}


class SpikeWatch:
    """Looks at steps in their order.

    Args:
        before: metrics of the steps already done, of which the last 100 count.
    """

    def __init__(self, before: Iterable[Mapping[str, Any]] = ()) -> None:
        self._recent = {name: deque[float](maxlen=WINDOW) for name in FACTORS}
        self.in_a_row = 0
        """Steps seen last whose loss or gradient norm was no number."""
        for line in before:
            counts_as = line.get("spike", {}).get("counts_as", {})
            self.in_a_row = 0 if "loss" in line else self.in_a_row + 1
            for name, recent in self._recent.items():
                if "loss" in line:
                    recent.append(counts_as.get(name, line[name]))

    def see(self, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """Whether a step with this loss and gradient norm is a spike; it is among those before from now on.

        Returns:
            {"of": "loss" or "grad_norm", "usual": the median, "factor": how many times that it is, "counts_as": name →
            value among the steps before the next}; of one that is no number {"of", "value": "nan" or "inf"}; or None.
        """
        for name in FACTORS:
            if not math.isfinite(facts[name]):
                self.in_a_row += 1
                return {"of": name, "value": str(facts[name])}
        self.in_a_row = 0
        spike: dict[str, Any] | None = None
        for name, recent in self._recent.items():
            value = facts[name]
            if len(recent) >= LEAST and (usual := median(recent)) > 0:
                limit = max(FACTORS[name] * usual, _mean_and_deviations(recent))
                if value > limit:
                    spike = spike or {"of": name, "usual": usual, "factor": round(value / usual, 3), "counts_as": {}}
                    spike["counts_as"][name] = value = limit
            recent.append(value)
        return spike


def _mean_and_deviations(values: Sequence[float]) -> float:
    """Their mean and DEVIATIONS standard deviations. `statistics` reckons in fractions, which takes as long as
    a small model's forward pass."""
    mean = math.fsum(values) / len(values)
    return mean + DEVIATIONS * math.dist(values, [mean] * len(values)) / math.sqrt(len(values))


def spike_text(facts: Mapping[str, Any], spike: Mapping[str, Any]) -> str:
    """A spike in words."""
    if "value" in spike:
        return f"the {NAMES[spike['of']]} is {spike['value']}"
    value, usual = facts[spike["of"]], spike["usual"]
    return f"the {NAMES[spike['of']]} is {value:.4g}, {spike['factor']:.2f} times the usual {usual:.4g}"
