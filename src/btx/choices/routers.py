"""The routers there are, what each is set by, and what a plain Hugging Face class can express of it. No torch.

The mathematics is in `btx.moe.routers`. A plain MoE class (Mixtral and its like) knows one rule: softmax over the K
largest logits, the same K in every layer. Whatever else routes is written in a folder that only btx reads
(`btx.model_files.btx_folder`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

from btx.errors import CheckpointError


@dataclass(frozen=True)
class RouterKind:
    """What there is to know of a router without importing torch."""

    summary: str
    """One line for `btx ls routers`."""
    label: str
    """A word or two for the report; `{top_k}` stands for the recipe's."""
    experts_per_token: Callable[[RoutingRule, int, int], int]
    """(rule, layer, number of experts) → experts a token uses in that layer."""
    why_not_plain: Callable[[RoutingRule, bool], str | None]


def _plain(rule: RoutingRule, probability_gates: bool) -> None:
    """The plain class routes like this."""


def _sampled_experts(rule: RoutingRule, layer: int, num_experts: int) -> int:
    return num_experts if rule.soft_first_layer and layer == 0 else 1


def _why_sampling_is_not_plain(rule: RoutingRule, probability_gates: bool) -> str | None:
    if not rule.soft_first_layer:
        return None
    return ("the first layer uses all experts, and the plain class has the same number in every layer; "
            "mix.soft_first_layer=false makes it a plain model with k = 1")  # fmt: skip


def _why_switch_is_not_plain(rule: RoutingRule, probability_gates: bool) -> str | None:
    if probability_gates:
        return None
    return "with one expert a token the plain class sets the gate to 1, Switch's is the softmax probability"


ROUTERS: dict[str, RouterKind] = {
    "top_k": RouterKind(
        "softmax over the k largest logits, any k (paper, section 3.2); saved as the plain class",
        "Top-{top_k}", lambda rule, layer, num_experts: rule.top_k, _plain,
    ),
    "switch": RouterKind(
        "top-1, gate = softmax probability, overflow over the capacity dropped in training "
        "(Switch Transformer, arXiv 2101.03961); saved for btx only, as the plain class for Qwen and OLMo",
        "Switch", lambda rule, layer, num_experts: 1, _why_switch_is_not_plain,
    ),
    "sample_top1": RouterKind(
        "Gumbel-softmax sample of one expert in training, hard choice at inference, first layer soft "
        "(paper, section 3.2); saved for btx only, as the plain class with mix.soft_first_layer=false",
        "Sample Top-1", _sampled_experts, _why_sampling_is_not_plain,
    ),
    "soft": RouterKind(
        "all experts, full softmax (paper, section 3.2); saved as the plain class with k = N",
        "soft", lambda rule, layer, num_experts: num_experts, _plain,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class RoutingRule:
    """The rule by which tokens are routed: a router and everything that sets it. The other routers' options are
    ignored."""

    kind: str = "top_k"
    """A name in `ROUTERS`."""
    top_k: int = 2
    """Experts a token uses (top_k)."""
    capacity_factor: float = 1.5
    """Rows an expert takes of a micro-batch, as a multiple of an equal share (switch)."""
    temperature_floor: float = 0.5
    """Lowest temperature (sample_top1)."""
    temperature_rate: float = 1e-4
    """r of the temperature exp(-r·t) after t optimiser steps (sample_top1)."""
    soft_first_layer: bool = True
    """The first layer uses all experts (sample_top1)."""

    def __post_init__(self) -> None:
        if self.kind not in ROUTERS:
            raise CheckpointError(f"router {self.kind!r}: no such router; there are: {', '.join(ROUTERS)}")

    def experts_per_token(self, layer: int, num_experts: int) -> int:
        """Experts a token uses in a layer."""
        return ROUTERS[self.kind].experts_per_token(self, layer, num_experts)

    def mean_experts_per_token(self, layers: int, num_experts: int) -> float:
        """`experts_per_token`, averaged over the layers."""
        return sum(self.experts_per_token(layer, num_experts) for layer in range(layers)) / layers

    def plain_top_k(self, num_experts: int) -> int:
        """K of the plain class: exact if `why_not_plain` is None, else what its config is filled with in memory."""
        return self.experts_per_token(1, num_experts)  # the first layer alone may differ from the others

    def why_not_plain(self, probability_gates: bool = False) -> str | None:
        """Why the plain class does not route like this at inference; None if it does.

        Args:
            probability_gates: the class can take softmax probabilities as gates (`Family.probability_gates`).
        """
        return ROUTERS[self.kind].why_not_plain(self, probability_gates)

    def as_json(self) -> dict[str, Any]:
        """For btx.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any, where: str) -> RoutingRule:
        """What `as_json` wrote."""
        defaults = asdict(cls())
        if not isinstance(value, dict) or not value.keys() <= defaults.keys():
            raise CheckpointError(f"{where}: router: expected some of {', '.join(defaults)}; found {value!r}")
        for key, setting in value.items():
            wanted = type(defaults[key])
            if type(setting) is not wanted and not (wanted is float and type(setting) is int):
                raise CheckpointError(f"{where}: router.{key}: expected {wanted.__name__}, found {setting!r}")
        kind = value.get("kind", "top_k")
        if kind not in ROUTERS:
            raise CheckpointError(f"{where}: router.kind: expected one of {', '.join(ROUTERS)}; found {kind!r}")
        return cls(**cast(dict[str, Any], value))
