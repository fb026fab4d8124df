"""How many tokens a model reads at once, by its config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from btx.choices.families.family import Config
from btx.errors import RecipeError

KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
DEFAULTS = {
    "llama": 2048, "mistral": 131_072, "ministral": 131_072, "ministral3": 262_144, "internlm3": 32_768,
    "iquestcoder": 131_072, "phi3": 4096, "qwen2": 32_768, "seed_oss": 524_288, "qwen3": 32_768, "olmo2": 2048,
    "olmo3": 2048, "granite": 2048, "granite_swa": 8192, "ernie4_5": 131_072, "cohere2": 8192,
    "hunyuan_v1_dense": 2048, "qwen3_5_text": 32_768,
}  # fmt: skip
"""`model_type` → what its config class takes for a config that says nothing (tests compare it with transformers)."""
STRETCHED = ("linear", "dynamic", "yarn")
"""Rope scalings that read `factor` times what the model was trained on, whether the config counts that or not; of the
others (llama3, longrope), max_position_embeddings is what they reach."""


def context_length(config: Config) -> tuple[int, str] | None:
    """Tokens that a model of this config reads at once, and the key that says so; None where nothing does."""
    key = next((key for key in KEYS if _whole(config.get(key))), None)
    if key is None and config.get("model_type") not in DEFAULTS:
        return None
    stated: int = DEFAULTS[config["model_type"]] if key is None else config[key]
    said = f"{key} {stated}" if key is not None else f"max_position_embeddings {stated}, the default of its class"
    for rope in _ropes(config):
        factor, kind = rope.get("factor"), rope.get("rope_type", rope.get("type"))
        if kind in STRETCHED and isinstance(factor, int | float) and factor > 1:
            trained: Any = rope.get("original_max_position_embeddings")
            reached = int((trained if _whole(trained) else stated) * factor)
            if reached > stated:
                stated, said = reached, f"{said}, {kind} rope with factor {factor:g}"
    return stated, said


def refuse_longer_sequences(config: Config, sequence_length: int, where: str) -> None:
    """Refuse training sequences that are longer than what the seed model reads at once.

    Args:
        config: the seed model's, from `where`.
    """
    longest = context_length(config)
    if longest is None or sequence_length <= longest[0]:
        return
    length, said = longest
    scaling = f"rope_type: yarn, factor: {-(-sequence_length // length)}, original_max_position_embeddings: {length}"
    raise RecipeError(
        f"data.sequence_length is {sequence_length:,}, but the seed model reads {length:,} tokens at once ({said}, in "
        f"{where}): set data.sequence_length={length} or less, or ask for rope scaling there, with max_position_"
        f"embeddings: {sequence_length} and rope_parameters: {{{scaling}, ...}}; a model that is trained from scratch "
        f"needs max_position_embeddings alone"
    )


def _ropes(config: Config) -> Iterator[dict[str, Any]]:
    """The rope settings, of all kinds of layers where each has its own."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, dict):
            yield from (part for part in (rope, *rope.values()) if isinstance(part, dict))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
