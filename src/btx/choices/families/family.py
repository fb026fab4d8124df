"""What a family says: where the feed-forward (FF) sublayer is in the dense class, and what the MoE class calls it.

Names are patterns: `{layer}` and `{expert}` stand for numbers. The FF sublayer's tensors have roles: `gate` (F, D),
`up` (F, D) and `down` (D, F). Every tensor that is no FF tensor is a shared weight and keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

Config = dict[str, Any]
ROLES = ("gate", "up", "down")


class Filled(NamedTuple):
    """A tensor with the same number everywhere."""

    shape: tuple[int, ...]
    value: float = 0.0


@dataclass(frozen=True)
class Family:
    """One dense class and the MoE class it mixes into."""

    dense: str
    """`model_type` of the dense config."""
    moe: str
    """`model_type` of the MoE config."""
    feed_forward: Mapping[str, str]
    """Role → name of the FF tensor in the dense layer."""
    experts: Mapping[str, tuple[str, ...]]
    """Published name → the roles laid into it one after another (rows). With `{expert}` in the name it is one expert's
    tensor; without, the tensors of all experts are stacked to (E, rows, columns)."""
    router: str
    """Published name of a layer's router, (E, D)."""
    moe_config: Callable[[Config, int, int], Config]
    """(dense config, num_experts, top_k) → MoE config. The experts' width is the dense config's `intermediate_size`."""
    refuse: Callable[[Config], str | None] = field(default=lambda dense: None)
    """Why this dense config cannot be expressed in the MoE class, or None."""
    inert: Callable[[Config], dict[str, Filled]] = field(default=lambda moe: {})
    """(MoE config) → tensors of a layer that the MoE class has and the dense class lacks, filled so that they add
    nothing."""
    fused: Callable[[Config], dict[str, dict[str, int]]] = field(default=lambda dense: {})
    """(dense config) → fused tensor → the tensors it consists of, with their numbers of rows, in order."""
    probability_gates: bool = False
    """With `norm_topk_prob: false` the class takes softmax probabilities as gates, so with k = 1 it is a Switch."""
    finetunes: bool = True
    """btx's MoE block can take the place of the class's; the others mix, but cannot be finetuned with btx."""
    exact: str = "base"
    """Variants that are exact: what the MoE of identical experts computes is what the dense model computes."""
    notes: str = ""
    """What else to know."""

    def feed_forward_match(self, name: str) -> tuple[int, str] | None:
        """(layer, role) if the dense tensor `name` belongs to an FF sublayer, else None. Fused tensors do not match."""
        for role, pattern in self.feed_forward.items():
            layer = match(pattern, name)
            if layer is not None:
                return layer, role
        return None

    def is_feed_forward(self, name: str, dense: Config) -> bool:
        """Whether the dense tensor `name`, fused or not, belongs to an FF sublayer."""
        apart = set(self.feed_forward.values())
        fused = [pattern for pattern, parts in self.fused(dense).items() if parts.keys() <= apart]
        return any(match(pattern, name) is not None for pattern in [*apart, *fused])


def match(pattern: str, name: str) -> int | None:
    """The layer number if `name` is `pattern` in some layer, else None."""
    matched = _regex(pattern).fullmatch(name)
    return int(matched.group(1)) if matched else None


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\{layer\}", r"(\d+)"))
