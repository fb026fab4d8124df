"""Recipe section: mixing. Plain Python."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from btx.recipe.section import (
    MergeName,
    Name,
    PositiveFloat,
    PositiveInt,
    RouterInitName,
    RouterName,
    Section,
    Share,
    Weight,
)


class Mix(Section):
    """Mixing the expert models into one MoE model (paper section 3.2)."""

    generalist: bool = True
    """Add the untouched seed model as one more expert."""
    router: RouterName = "top_k"
    """How tokens are routed (paper: top_k; the others are its ablations); `btx ls routers` explains them."""
    top_k: PositiveInt = 2
    """Experts a token uses with the top_k router."""
    capacity_factor: PositiveFloat = 1.5
    """switch: rows an expert takes of a micro-batch in training, as a multiple of an equal share; more are dropped."""
    temperature_floor: PositiveFloat = 0.5
    """sample_top1: lowest temperature of the Gumbel-softmax."""
    temperature_rate: Weight = 1e-4
    """sample_top1: r of the temperature exp(-r·t) after t optimiser steps."""
    soft_first_layer: bool = True
    """sample_top1: the first layer uses all experts (paper); false makes the result a plain model with k = 1."""
    merge: MergeName = "mean"
    """How shared weights are merged; the paper: mean over experts and generalist. `btx ls merges` explains them."""
    merge_weights: dict[Name, Weight] | None = None
    """merge weighted: expert → weight, the generalist's too; normalised."""
    slerp_t: Share | None = None
    """merge slerp: 0 is the first model, 1 the second; default 0.5."""
    merge_density: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """merge ties, dare: share of every task vector's entries that is kept; default 0.2 and 0.5."""
    merge_scale: PositiveFloat | None = None
    """merge ties, dare: factor on the merged task vector (λ in the papers); default 1."""
    router_init: RouterInitName = "ridge"
    """How the routers start; hidden_mean and ridge are computed from the domains' text. The paper: random,
    which is also the default with blend."""
    router_std: PositiveFloat = 0.02
    """Standard deviation of random routers."""
    router_scale: PositiveFloat | None = None
    """hidden_mean, ridge: factor on the weights, the larger the sharper; default 1 and 10."""
    router_ridge: PositiveFloat = 1e-3
    """ridge: λ as a multiple of the mean of XᵀX's diagonal."""
    router_tokens: PositiveInt = 50_000
    """hidden_mean, ridge: tokens of every domain that are looked at."""
    split: PositiveInt = 1
    """Chunks every FF sublayer is cut into, each an expert of its own (paper section 4.3); 1 leaves experts whole."""
    split_rescale: bool = True
    """Multiply the chunks' outputs by `split`, so that the layer's output keeps its size."""
    blend: bool = False
    """Expert n gets the n-th chunk of every FF sublayer (paper section 4.3)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the mixed model's weights; default: the seed model's."""
    tokenizer_from: str | None = None
    """Expert (or `seed`) whose tokenizer the mixed model gets; vocabularies that differ are then allowed."""
    max_shard_size: str = "5GB"
    """Size a weights file has at most."""

    @model_validator(mode="before")
    @classmethod
    def _blended_experts_have_no_domains(cls, values: Any) -> Any:
        """There is no text whose routers could be computed, so the default is random there."""
        is_blended = isinstance(values, dict) and values.get("blend") is True
        return {"router_init": "random"} | values if is_blended else values
