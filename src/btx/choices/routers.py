"""The routers there are, what each is set by, and what a plain Hugging Face class can express of it. No torch.

The mathematics is in `btx.moe.routers`. A plain MoE class (Mixtral and its like) knows one rule: softmax over the K
largest logits, the same K in every layer. Whatever else routes is written in a folder that only btx reads
(`btx.model_files.btx_folder`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from btx.errors import CheckpointError

Kind = Literal["top_k", "switch", "sample_top1", "soft"]

ROUTERS: dict[str, str] = {
    "top_k": "softmax over the k largest logits, any k (paper, section 2.2); saved as the plain class",
    "switch": "top-1, gate = softmax probability, overflow over the capacity dropped in training "
              "(Switch Transformer, arXiv 2101.03961); saved for btx only, as the plain class for Qwen and OLMo",
    "sample_top1": "Gumbel-softmax sample of one expert in training, hard choice at inference, first layer soft "
                   "(paper, section 2.2); saved for btx only, as the plain class with mix.soft_first_layer=false",
    "soft": "all experts, full softmax (paper, section 2.2); saved as the plain class with k = N",
}  # fmt: skip


@dataclass(frozen=True)
class RoutingSettings:
    """A router and everything that sets it. The options of the other routers are ignored."""

    kind: Kind = "top_k"
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

    def experts_per_token(self, layer: int, num_experts: int) -> int:
        """Experts a token uses in a layer."""
        if self.kind == "soft" or (self.kind == "sample_top1" and self.soft_first_layer and layer == 0):
            return num_experts
        return self.top_k if self.kind == "top_k" else 1

    def mean_experts_per_token(self, layers: int, num_experts: int) -> float:
        """`experts_per_token`, averaged over the layers."""
        return sum(self.experts_per_token(layer, num_experts) for layer in range(layers)) / layers

    def plain_top_k(self, num_experts: int) -> int:
        """K of the plain class: exact if `why_not_plain` is None, else what its config is filled with in memory."""
        return num_experts if self.kind == "soft" else self.top_k if self.kind == "top_k" else 1

    def why_not_plain(self, probability_gates: bool = False) -> str | None:
        """Why the plain class does not route like this at inference; None if it does.

        Args:
            probability_gates: the class can take softmax probabilities as gates (`Family.probability_gates`).
        """
        if self.kind == "switch" and not probability_gates:
            return "with one expert a token the plain class sets the gate to 1, Switch's is the softmax probability"
        if self.kind == "sample_top1" and self.soft_first_layer:
            return ("the first layer uses all experts, and the plain class has the same number in every layer; "
                    "mix.soft_first_layer=false makes it a plain model with k = 1")  # fmt: skip
        return None

    def as_json(self) -> dict[str, Any]:
        """For btx.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any, where: str) -> RoutingSettings:
        """What `as_json` wrote.

        Raises:
            CheckpointError: an unknown router or option, or a value of another type.
        """
        defaults = asdict(cls())
        if not isinstance(value, dict) or not value.keys() <= defaults.keys():
            raise CheckpointError(f"{where}: router: expected some of {', '.join(defaults)}; found {value!r}")
        for key, given in value.items():
            wanted = type(defaults[key])
            if type(given) is not wanted and not (wanted is float and type(given) is int):
                raise CheckpointError(f"{where}: router.{key}: expected {wanted.__name__}, found {given!r}")
        kind = value.get("kind", "top_k")
        if kind not in get_args(Kind):
            raise CheckpointError(f"{where}: router.kind: expected one of {', '.join(ROUTERS)}; found {kind!r}")
        return cls(**cast(dict[str, Any], value))
