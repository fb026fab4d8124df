"""What the routers do while they train: load of the experts, entropy, dropped rows, dead experts.

Cheap enough to be always on: sums stay on the device and come to Python with the loss.

Shape letters: T tokens, E experts, K experts a token, L layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from btx.moe.balancing import routed_rows
from btx.moe.routers import Routing

DEAD_LOAD = 0.001
"""An expert with less than this share of a layer's rows is dead."""
WATCHED_STEPS = 20
"""Steps over which the load is averaged before an expert is called dead."""


class RoutingMeter:
    """Sums over the micro-batches of one optimiser step."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: Tensor | None = None
        """(L, E + 2): rows by expert, entropy, dropped rows."""
        self.rows_L: list[int] = []

    def add(self, routings_L: Sequence[Routing]) -> None:
        """Count one micro-batch."""
        lines = []
        with torch.no_grad():
            for routing in routings_L:
                rows_E, log_probs_TE = routed_rows(routing), routing.logits_TE.log_softmax(dim=-1)
                entropy = -(log_probs_TE.exp() * log_probs_TE).sum()
                dropped = routing.expert_ids_TK.numel() - rows_E.sum()
                lines.append(torch.cat([rows_E, torch.stack([entropy, dropped])]))
        stacked = torch.stack(lines)
        self.sums = stacked if self.sums is None else self.sums + stacked
        self.tokens += routings_L[0].logits_TE.shape[0]
        self.rows_L = [routing.expert_ids_TK.shape[1] for routing in routings_L]

    def values(self) -> dict[str, Tensor]:
        """What `facts` takes, on the device; empty for a dense model."""
        return {} if self.sums is None else {"routing": self.sums}

    def facts(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """For metrics.jsonl, a value or list per layer: `load` (share of the rows by expert), `router_entropy` (of the
        router's probabilities, mean over tokens, nats), `dropped` (share of rows over the capacity)."""
        if "routing" not in values:
            return {}
        table = values["routing"].tolist()
        return {
            "load": [[round(rows / max(1.0, sum(line[:-2])), 4) for rows in line[:-2]] for line in table],
            "router_entropy": [round(line[-2] / self.tokens, 4) for line in table],
            "dropped": [round(line[-1] / (self.tokens * k), 4) for line, k in zip(table, self.rows_L, strict=True)],
        }


class DeadExpertWatch:
    """Says once for each expert and layer that it gets next to no rows any more.

    Args:
        experts: their names; without, numbers are shown.
    """

    def __init__(self, experts: Sequence[str], log: Callable[[str], None]) -> None:
        self.experts = experts
        self.log = log
        self.recent: deque[list[list[float]]] = deque(maxlen=WATCHED_STEPS)
        self.told: set[tuple[int, int]] = set()

    def see(self, load_LE: list[list[float]]) -> list[list[int]]:
        """Take one step's load; returns [layer, expert] of the dead ones, empty until enough steps are seen."""
        self.recent.append(load_LE)
        if len(self.recent) < WATCHED_STEPS:
            return []
        mean_LE = torch.tensor(list(self.recent)).mean(dim=0)
        dead = [(layer, expert) for layer, expert in (mean_LE < DEAD_LOAD).nonzero().tolist()]
        for layer, expert in dead:
            if (layer, expert) not in self.told:
                self.told.add((layer, expert))
                name = self.experts[expert] if expert < len(self.experts) else f"number {expert}"
                self.log(
                    f"warning: expert {name} is dead in layer {layer}: under {DEAD_LOAD:.1%} of the rows over the "
                    f"last {WATCHED_STEPS} steps; raise finetune.load_balancing"
                )
        return [list(pair) for pair in dead]
