"""Everything that decides what a mix becomes, but for the models and the text themselves. Plain Python, no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from btx.choices.merges import MergeSettings
from btx.choices.router_inits import RouterInit
from btx.choices.routers import RoutingRule
from btx.errors import CheckpointError
from btx.recipe.schema import Recipe

Part = TypeVar("Part", MergeSettings, RouterInit)


def seeded(part: Part, rng_seed: int, name: str) -> Part:
    """Settings of a part of a mix with the mix's random number seed; refused if they have another one already."""
    if part.rng_seed not in (0, rng_seed):
        raise CheckpointError(f"rng_seed is {rng_seed}, and {part.rng_seed} in {name}: one holds for all, say it once")
    return replace(part, rng_seed=rng_seed)


@dataclass(frozen=True)
class MixSettings:
    """How expert models are mixed.

    Raises:
        CheckpointError: one thing is said twice: `top_k` beside `routing`, or another `rng_seed` in a part.
    """

    generalist: bool = True
    """Add the seed model as one more expert and into the mean."""
    top_k: int | None = None
    """Experts a token uses, with the paper's Top-K; default 2. Any other router is told by `routing`."""
    routing: RoutingRule | None = None
    """The rule by which tokens are routed. A folder whose rule the plain class cannot express is read by btx alone."""
    merge: str | MergeSettings = "mean"
    """How shared weights are merged, by name or with parameters."""
    router_init: str | RouterInit = "random"
    """How routers start, by name or with parameters."""
    split: int = 1
    """Chunks every FF sublayer is cut into, each an expert of its own (paper, section 4.3)."""
    split_rescale: bool = True
    """Keep the size of the layer's output when split."""
    blend: bool = False
    """Expert n gets the n-th chunk of every FF sublayer (paper, section 4.3)."""
    rng_seed: int = 0
    """Random number seed of routers and of merge methods that draw."""
    dtype: str | None = None
    """Type of all weights, `float32`, `bfloat16` or `float16`; default: the seed model's."""
    tokenizer_from: str | None = None
    """An expert's name, `seed` or a folder: whose tokenizer the output gets. Vocabularies that differ are then
    allowed."""
    max_shard_size: int | str = "5GB"
    """Size an output file has at most, in bytes or as `500MB`."""

    def __post_init__(self) -> None:
        if self.top_k is not None and self.routing is not None:
            raise CheckpointError(
                f"top_k is {self.top_k}, and routing says how tokens are routed ({self.routing.kind}, top_k "
                f"{self.routing.top_k}): give one of the two"
            )
        _ = self.merging, self.start  # which refuse another rng_seed than the mix's

    @property
    def rule(self) -> RoutingRule:
        """How tokens are routed, whichever way it was said."""
        if self.top_k is not None:
            return RoutingRule(top_k=self.top_k)
        return self.routing or RoutingRule()

    @property
    def merging(self) -> MergeSettings:
        """How shared weights are merged, with the random number seed."""
        merge = MergeSettings(self.merge) if isinstance(self.merge, str) else self.merge
        return seeded(merge, self.rng_seed, "merge")

    @property
    def start(self) -> RouterInit:
        """How routers start, with the random number seed."""
        init = RouterInit(self.router_init) if isinstance(self.router_init, str) else self.router_init
        return seeded(init, self.rng_seed, "router_init")

    @classmethod
    def of_arguments(cls, settings: MixSettings | None, knobs: dict[str, Any]) -> MixSettings:
        """Settings that were given as one object or as keywords; raises TypeError for both, or an unknown keyword."""
        allowed = [field.name for field in fields(cls)]
        if unknown := [name for name in knobs if name not in allowed]:
            raise TypeError(f"mix() takes no {', '.join(unknown)}; its settings are: {', '.join(allowed)}")
        if settings is not None and knobs:
            raise TypeError(f"mix() takes settings or keywords, not both; given beside settings: {', '.join(knobs)}")
        return settings or cls(**knobs)


def mix_settings(recipe: Recipe) -> MixSettings:
    """How a recipe mixes."""
    mix = recipe.mix
    return MixSettings(
        generalist=mix.generalist, routing=recipe.routing, merge=recipe.merge_settings, router_init=recipe.router_init,
        split=mix.split, split_rescale=mix.split_rescale, blend=mix.blend, rng_seed=recipe.rng_seed, dtype=mix.dtype,
        tokenizer_from=mix.tokenizer_from, max_shard_size=mix.max_shard_size,
    )  # fmt: skip


def upcycling_settings(recipe: Recipe) -> MixSettings:
    """How copies of the seed model are mixed for the recipe's upcycling baselines: the shape of its mix, with Top-K
    routing and random routers. Blended copies of one FF sublayer are that sublayer, so `mix.blend` changes nothing.
    """
    return replace(
        mix_settings(recipe), generalist=False, merge="mean", blend=False, tokenizer_from=None,
        routing=RoutingRule(top_k=recipe.routing.plain_top_k(len(recipe.expert_names))),
        router_init=RouterInit("random", std=recipe.mix.router_std),
    )  # fmt: skip
