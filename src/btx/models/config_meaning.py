"""What a config means: two that are written differently and give the same model are the same here.

Old and new spellings of rope, a head size that is said or follows, a window that is null, 0, switched off or used by no
layer, numbers that went through float32, keys without effect on what a layer computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from btx.choices.families import Config
from btx.choices.families.configs import rope_of
from btx.models.configs import config_defaults

# What may differ without changing what the tensors mean.
HARMLESS_KEYS = {
    "_name_or_path", "name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id", "return_dict", "id2label", "label2id",
    "problem_type", "chunk_size_feed_forward", "pretraining_tp", "model_type", "is_encoder_decoder", "auto_map",
    "router_aux_loss_coef", "router_jitter_noise", "attn_implementation", "_attn_implementation", "layerdrop",
    "use_bfloat16", "torchscript", "task_specific_params", "_commit_hash", "quantization_config", "rope_theta",
    "rope_scaling", "partial_rotary_factor", "use_sliding_window",
}  # fmt: skip
HARMLESS_ENDS = ("dropout", "_pdrop", "dropout_prob", "dropout_rate")  # they act in training only, which is over
HARMLESS_STARTS = ("output_", "summary_")
SAME_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}
ROPE_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0}
OF_PLAIN_ROPE = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key → its meanings in two configs of one class, where they differ.

    Args:
        one, other: completed with the class's defaults, as `read_config` gives them.
    """
    first, second = meaning(one), meaning(other)
    return {key: (first.get(key), second.get(key)) for key in sorted(first.keys() | second.keys())
            if not _same(first.get(key), second.get(key))}  # fmt: skip


def meaning(config: Mapping[str, Any]) -> Config:
    """What the keys mean that have an effect on the result, each written in one way.

    Keys that are unknown to the class have none.
    """
    defaults = config_defaults(str(config["model_type"]))
    meant = {
        key: False if value is None and isinstance(defaults.get(key), bool) else value
        for key, value in config.items() if (key in defaults or key == "rope_parameters") and not _is_harmless(key)
    }  # fmt: skip
    if "rope_parameters" in meant or "rope_theta" in config:
        meant["rope_parameters"] = _rope(rope_of(dict(config)))
    if heads := config.get("num_attention_heads"):
        meant["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
        meant["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    if "hidden_act" in meant:
        meant["hidden_act"] = SAME_ACTIVATIONS.get(str(meant["hidden_act"]), meant["hidden_act"])
    return meant | _windows(meant, config, "use_sliding_window" in defaults)


def _is_harmless(key: str) -> bool:
    return key in HARMLESS_KEYS or key.endswith(HARMLESS_ENDS) or key.startswith(HARMLESS_STARTS)


def _rope(rope: Mapping[str, Any]) -> Config:
    """Rope parameters of a model, or of each kind of layer."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {kind: _rope(rope_of({"rope_parameters": value})) for kind, value in rope.items()
                if isinstance(value, dict)}  # fmt: skip
    kind = {"su": "longrope"}.get(rope["rope_type"], rope["rope_type"])
    if kind == "linear" and rope.get("factor") == 1:
        kind = "default"
    known = {key: value for key, value in rope.items() if value is not None and value != ROPE_DEFAULTS.get(key)}
    if kind == "default":
        known = {key: value for key, value in known.items() if key in OF_PLAIN_ROPE}
    return known | {"rope_type": kind}


def _windows(meant: Mapping[str, Any], config: Mapping[str, Any], switched: bool) -> Config:
    """The window, None where no layer has one, and which layers have it, None where it is all or none of them."""
    if "sliding_window" not in meant:
        return {}
    window, layers = meant["sliding_window"] or None, config.get("layer_types")
    if (switched and not config.get("use_sliding_window")) or (layers and "sliding_attention" not in layers):
        window = None
    if layers and window is None:
        layers = ["full_attention" if layer == "sliding_attention" else layer for layer in layers]
    changed: Config = {"sliding_window": window}
    if "layer_types" in meant:
        changed["layer_types"] = None if layers and set(layers) == {"full_attention"} else layers
    if "max_window_layers" in meant and (layers or window is None):
        changed["max_window_layers"] = None
    return changed


def _same(one: Any, two: Any) -> bool:
    """Equal, numbers up to the rounding of float32."""
    if isinstance(one, bool) or isinstance(two, bool):
        return bool(one == two)
    if isinstance(one, int | float) and isinstance(two, int | float):
        return math.isclose(one, two, rel_tol=1e-6)
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    return bool(one == two)
