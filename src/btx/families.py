"""Which dense class becomes which MoE class: one entry a family, plain Python, no torch.

A family says where the feed-forward (FF) sublayer sits in the dense model's tensor names, what those tensors are
called in the published layout of the MoE class, and how the dense config becomes the MoE config. Every tensor that
is not an FF tensor is a shared weight and keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from btx.errors import CheckpointError

Config = dict[str, Any]

_LAYER = "model.layers.{layer}"


@dataclass(frozen=True)
class Family:
    """One dense class and the MoE class it mixes into."""

    dense: str
    """`model_type` of the dense config."""
    moe: str
    """`model_type` of the MoE config."""
    feed_forward: dict[str, str]
    """FF tensor in the dense layer → tensor of one expert; `{layer}` and `{expert}` are filled in."""
    router: str
    """Name of a layer's router tensor, (E, D)."""
    moe_config: Callable[[Config, int, int], Config]
    """(dense config, num_experts, top_k) → MoE config."""
    refuse: Callable[[Config], str | None]
    """Why this dense config cannot be expressed in the MoE class, or None."""

    def feed_forward_match(self, name: str) -> tuple[int, str] | None:
        """(layer, pattern) if the dense tensor `name` belongs to an FF sublayer, else None."""
        for pattern in self.feed_forward:
            found = re.fullmatch(re.escape(pattern).replace(r"\{layer\}", r"(\d+)"), name)
            if found:
                return int(found.group(1)), pattern
        return None


def _mixtral_config(dense: Config, num_experts: int, top_k: int) -> Config:
    """Copy what both classes have. The rope base is always written out: Llama's default is 1e4, Mixtral's 1e6."""
    kept = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id "
        "eos_token_id tie_word_embeddings attention_dropout"
    ).split()
    config = {key: dense[key] for key in kept if key in dense}
    rope = dense.get("rope_parameters") or {"rope_type": "default", **(dense.get("rope_scaling") or {})}
    rope = {"rope_theta": dense.get("rope_theta", 10000.0), **rope}
    dtype = dense.get("dtype") or dense.get("torch_dtype") or "float32"
    return config | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
        "sliding_window": None,
        # transformers' own balancing loss stays off: it is not the paper's, and plain inference needs none.
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.0,
        # transformers 5 reads rope_parameters and dtype, transformers 4 the older keys and nothing else.
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _refuse_llama(dense: Config) -> str | None:
    if dense.get("attention_bias"):
        return "attention_bias: Mixtral's attention has no biases"
    if dense.get("mlp_bias"):
        return "mlp_bias: Mixtral's experts have no biases"
    return None


FAMILIES: dict[str, Family] = {
    "llama": Family(
        dense="llama",
        moe="mixtral",
        feed_forward={
            f"{_LAYER}.mlp.gate_proj.weight": f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w1.weight",
            f"{_LAYER}.mlp.up_proj.weight": f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w3.weight",
            f"{_LAYER}.mlp.down_proj.weight": f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w2.weight",
        },
        router=f"{_LAYER}.block_sparse_moe.gate.weight",
        moe_config=_mixtral_config,
        refuse=_refuse_llama,
    ),
}


def family_of(config: Config, where: str) -> Family:
    """The family of a dense config read from `where`.

    Raises:
        CheckpointError: unknown family, or a variant the MoE class cannot express.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} cannot be mixed; families: {', '.join(sorted(FAMILIES))}"
        )
    reason = family.refuse(config)
    if reason:
        raise CheckpointError(f"{where}: {model_type} cannot become {family.moe}: {reason}")
    return family
