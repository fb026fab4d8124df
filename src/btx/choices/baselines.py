"""The baselines there are, what each starts from, and what its training is matched by. Plain Python, no torch.

A baseline differs from the BTX run in its start weights, its data, the weights that train or its tokens; the training
path is the same (`btx.stages.baselines`). How each is matched, with formulas: docs/baselines.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Start = Literal["experts", "seed", "upcycled", "mix"]
MatchedBy = Literal["nothing", "tokens", "flops", "recipe"]

UPCYCLED = "upcycled"
"""Folder, below baselines/, of the start that both upcycling baselines share."""
DOMAINS = "_domains"
"""Ending of the stage that trains a baseline on the branches' data, before it trains on the finetuning's."""


@dataclass(frozen=True)
class BaselineKind:
    """What there is to know of a baseline."""

    summary: str
    """One sentence for `btx ls baselines`."""
    label: str
    """A few words for tables."""
    start: Start
    """What it starts from: the finished expert models, which it does not train (experts); the seed model (seed); the
    seed model with copies of its FF sublayers as experts (upcycled); the run's own mixed model (mix)."""
    matched_by: MatchedBy
    """What its training has in common with the BTX run's: tokens, FLOPs, or nothing because it is not trained."""
    router: str | None = None
    """Router instead of the recipe's, a name in `btx.choices.routers`."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the finetuning that are replaced."""

    @property
    def trains(self) -> bool:
        """Whether it has training of its own."""
        return self.start != "experts"

    @property
    def two_phases(self) -> bool:
        """Whether it trains on the branches' data first, then on the finetuning's."""
        return self.start in ("seed", "upcycled")

    @property
    def has_routers(self) -> bool:
        """Whether it is a MoE model that is trained."""
        return self.start in ("upcycled", "mix")


BASELINES: dict[str, BaselineKind] = {
    "soup": BaselineKind(
        "All weights of the expert models (and the generalist) averaged into one dense model; not trained further.",
        "expert models and seed model averaged", "experts", "nothing",
    ),
    "dense_dm": BaselineKind(
        "Dense, data-matched: the seed model trained on the sequences of all branches, then on those of the "
        "finetuning, in the same order (paper, section 4.1).",
        "dense, same data", "seed", "tokens",
    ),
    "dense_cm": BaselineKind(
        "Dense, compute-matched: dense_dm with both phases longer by one factor, until its training FLOPs equal the "
        "run's.",
        "dense, same FLOPs", "seed", "flops",
    ),
    "upcycling_dm": BaselineKind(
        "Sparse upcycling, data-matched: copies of the seed model's FF sublayers as experts, random routers, trained "
        "on the same data as dense_dm with the MoE losses (arXiv 2212.05055; paper, section 4.1).",
        "sparse upcycling, same data", "upcycled", "tokens",
    ),
    "upcycling_cm": BaselineKind(
        "Sparse upcycling, compute-matched: upcycling_dm with both phases scaled by one factor, until its training "
        "FLOPs equal the run's.",
        "sparse upcycling, same FLOPs", "upcycled", "flops",
    ),
    "btm_top1": BaselineKind(
        "Branch-Train-Merge: the expert model whose training text is nearest to the context by tf-idf answers alone "
        "(arXiv 2208.03306).",
        "BTM, one expert model a context", "experts", "nothing",
    ),
    "btm_top2": BaselineKind(
        "Branch-Train-Merge: the next-token distributions of the two nearest expert models are mixed.",
        "BTM, two expert models a context", "experts", "nothing",
    ),
    "btx_sample_top1": BaselineKind(
        "The run's mix finetuned with the Sample Top-1 router, same tokens (paper, table 4).",
        "BTX, Sample Top-1", "mix", "tokens", router="sample_top1",
    ),
    "btx_soft": BaselineKind(
        "The run's mix finetuned with the soft router, all experts for every token, same tokens (paper, table 4).",
        "BTX, soft routing", "mix", "tokens", router="soft",
    ),
    "btx_switch": BaselineKind(
        "The run's mix finetuned with the Switch router, same tokens (paper, table 4).",
        "BTX, Switch", "mix", "tokens", router="switch",
    ),
    "btx_no_balancing": BaselineKind(
        "The run's mix finetuned without the load-balancing loss (paper, table 5).",
        "BTX without load balancing", "mix", "tokens", changes={"load_balancing": 0.0, "load_balancing_bias": 0.0},
    ),
    "btx_frozen_experts": BaselineKind(
        "The run's mix finetuned with its experts frozen: routers and shared weights train (paper, table 5).",
        "BTX, experts frozen", "mix", "tokens", changes={"trainable": "all_but_experts"},
    ),
    "btx_routers_only": BaselineKind(
        "The run's mix finetuned with nothing but its routers trained.",
        "BTX, only routers trained", "mix", "tokens", changes={"trainable": "routers"},
    ),
}  # fmt: skip

BTM: dict[str, int] = {"btm_top1": 1, "btm_top2": 2}
"""Branch-Train-Merge baselines → expert models a context uses."""


def stage_names(name: str) -> list[str]:
    """The stages that a baseline's training goes through, the last being the one that leaves its model."""
    result = f"baselines/{name}"
    return [result + DOMAINS, result] if BASELINES[name].two_phases else [result]


def is_trained(stage: str) -> bool:
    """Whether a stage below baselines/ runs the training loop."""
    name = stage.removeprefix("baselines/").removesuffix(DOMAINS)
    return name in BASELINES and BASELINES[name].trains
