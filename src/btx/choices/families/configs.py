"""Dense config → MoE config, class by class: (dense config, num_experts, top_k) → what goes into config.json.

The dense config is complete (the class's defaults filled in); `intermediate_size` is the width of one expert.
"""

from __future__ import annotations

import math

from btx.choices.families.family import Config

COMMON = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id "
    "eos_token_id tie_word_embeddings attention_dropout attention_bias"
)
LINEAR_ATTENTION = (
    "layer_types linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads "
    "linear_num_value_heads"
)
GRANITE = "embedding_multiplier attention_multiplier residual_multiplier logits_scaling"
ZERO_SHARED_EXPERT_SIZE = 64
"""Width of the shared expert of zeros in classes that insist on one: small, yet divisible by what engines split by."""

# transformers' own balancing loss stays off: it is not the paper's, and plain inference needs none.
ROUTER_LOSS_OFF: Config = {"output_router_logits": False, "router_aux_loss_coef": 0.0}


def carried(dense: Config, keys: str = COMMON) -> Config:
    """The named values of a dense config, where it has them."""
    return {key: dense[key] for key in keys.split() if key in dense and not (key == "head_dim" and dense[key] is None)}


def rope_of(dense: Config) -> Config:
    """Rope parameters of a dense config, written by transformers 4 or 5, with the base and the type always in them.

    The type was called `type` before transformers 4.43, and stays beside `rope_type` when such a config is read.
    """
    rope = dict(dense.get("rope_parameters") or dense.get("rope_scaling") or {})
    base = {"rope_theta": dense.get("rope_theta") or 10000.0}
    if any(isinstance(value, dict) for value in rope.values()):  # one for each kind of layer
        return base | rope
    older = rope.pop("type", None)
    return base | ({} if "rope_type" in rope else {"rope_type": older or "default"}) | rope


def with_rope(config: Config, rope: Config) -> Config:
    """`config` with rope under the keys of transformers 5 and of transformers 4, which ignores the others.

    The base is always written out: Llama's default is 1e4, Mixtral's 1e6.
    """
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_default = rope.get("rope_type", "default") == "default"
    partial = {"partial_rotary_factor": rope["partial_rotary_factor"]} if "partial_rotary_factor" in rope else {}
    return config | partial | {
        "rope_parameters": rope, "rope_theta": rope["rope_theta"], "rope_scaling": None if is_default else scaling
    }  # fmt: skip


def with_dtype(config: Config, dtype: str) -> Config:
    """`config` with the weights' type under the keys of transformers 5 and of transformers 4."""
    return config | {"dtype": dtype, "torch_dtype": dtype}


def _moe(dense: Config, model_type: str, architecture: str) -> Config:
    """What every MoE config begins with."""
    dtype = dense.get("dtype") or dense.get("torch_dtype") or "float32"
    config = carried(dense) | ROUTER_LOSS_OFF | {"architectures": [architecture], "model_type": model_type}
    return with_dtype(config, str(dtype))


def _qwen_experts(dense: Config, num_experts: int, top_k: int) -> Config:
    """The experts of the Qwen classes. `norm_topk_prob` is false by default: gates would not sum to 1."""
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": dense["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def mixtral(dense: Config, num_experts: int, top_k: int) -> Config:
    """Mixtral: Llama's layer with experts; a sliding window holds for all layers."""
    config = _moe(dense, "mixtral", "MixtralForCausalLM") | {
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
        "sliding_window": dense.get("sliding_window"),
        "router_jitter_noise": 0.0,
    }
    config.pop("attention_bias", None)
    return with_rope(config, rope_of(dense))


def mixtral_of_ministral(dense: Config, num_experts: int, top_k: int) -> Config:
    """The window holds for all layers or for none; `refuse` has seen to it."""
    is_sliding = "sliding_attention" in (dense.get("layer_types") or ["sliding_attention"])
    window = dense.get("sliding_window") if is_sliding else None
    return mixtral(dense | {"sliding_window": window}, num_experts, top_k)


def mixtral_of_ministral3(dense: Config, num_experts: int, top_k: int) -> Config:
    """Ministral 3 scales queries beyond the original context length, Mixtral does not: the context ends there."""
    rope = rope_of(dense)
    beta, original = rope.pop("llama_4_scaling_beta", None), rope.get("original_max_position_embeddings")
    rope.pop("max_position_embeddings", None)
    longest = min(dense["max_position_embeddings"], original or math.inf) if beta else dense["max_position_embeddings"]
    return mixtral(dense | {"rope_parameters": rope, "max_position_embeddings": longest}, num_experts, top_k)


def qwen2_moe(dense: Config, num_experts: int, top_k: int) -> Config:
    """Qwen2-MoE: biases on query, key and value; a shared expert, which is zero."""
    config = _moe(dense, "qwen2_moe", "Qwen2MoeForCausalLM")
    config |= _qwen_experts(dense, num_experts, top_k) | carried(dense, "max_window_layers layer_types") | {
        "shared_expert_intermediate_size": ZERO_SHARED_EXPERT_SIZE,
        "qkv_bias": bool(config.pop("attention_bias", True)),
        "use_sliding_window": bool(dense.get("sliding_window")),
        "sliding_window": dense.get("sliding_window"),
    }  # fmt: skip
    return with_rope(config, rope_of(dense))


def qwen3_moe(dense: Config, num_experts: int, top_k: int) -> Config:
    """Qwen3-MoE: full attention in every layer."""
    config = _moe(dense, "qwen3_moe", "Qwen3MoeForCausalLM") | _qwen_experts(dense, num_experts, top_k)
    return with_rope(config | {"use_sliding_window": False, "sliding_window": None}, rope_of(dense))


def mellum(dense: Config, num_experts: int, top_k: int) -> Config:
    """Mellum: Qwen3-MoE with a window in some layers, and rope parameters for each kind of layer."""
    config = _moe(dense, "mellum", "MellumForCausalLM") | _qwen_experts(dense, num_experts, top_k)
    config |= carried(dense, "layer_types sliding_window")
    config |= {"mlp_layer_types": ["sparse"] * dense["num_hidden_layers"]}
    rope = rope_of(dense)
    return config | {"rope_parameters": {"full_attention": rope, "sliding_attention": dict(rope)}}


def flex_olmo(dense: Config, num_experts: int, top_k: int) -> Config:
    """FlexOlmo: OLMo 2's layer with experts, full attention in every layer."""
    config = _moe(dense, "flex_olmo", "FlexOlmoForCausalLM")
    config |= {"num_experts": num_experts, "num_experts_per_tok": top_k, "norm_topk_prob": True}
    rope = rope_of(dense)
    return with_rope(config, rope.get("full_attention") or rope)


def granitemoe(dense: Config, num_experts: int, top_k: int) -> Config:
    """GraniteMoE: Granite's layer with experts."""
    config = _moe(dense, "granitemoe", "GraniteMoeForCausalLM") | carried(dense, GRANITE)
    config |= {"num_local_experts": num_experts, "num_experts_per_tok": top_k}
    return with_rope(config, rope_of(dense))


def granitemoe_of_llama(dense: Config, num_experts: int, top_k: int) -> Config:
    """Llama is a Granite whose multipliers are 1 and whose attention is scaled by 1/√head_dim."""
    head_dim = dense.get("head_dim") or dense["hidden_size"] // dense["num_attention_heads"]
    multipliers = dict.fromkeys(GRANITE.split(), 1.0) | {"attention_multiplier": head_dim**-0.5}
    return granitemoe(dense | multipliers, num_experts, top_k)


def granitemoe_swa(dense: Config, num_experts: int, top_k: int) -> Config:
    """GraniteMoE with windows, attention sinks and a rope base per layer."""
    config = granitemoe(dense, num_experts, top_k)
    config |= carried(dense, "sliding_window layer_types layer_rope_theta")
    return config | {
        "architectures": ["GraniteMoeSWAForCausalLM"], "model_type": "granitemoe_swa", "shared_intermediate_size": 0
    }  # fmt: skip


def ernie4_5_moe(dense: Config, num_experts: int, top_k: int) -> Config:
    """ERNIE 4.5 MoE with experts in every layer and no shared expert."""
    config = _moe(dense, "ernie4_5_moe", "Ernie4_5_MoeForCausalLM") | {
        "use_bias": False,
        "moe_intermediate_size": dense["intermediate_size"],
        "moe_num_experts": num_experts,
        "moe_k": top_k,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": dense["num_hidden_layers"] - 1,
        "moe_layer_interval": 1,
    }
    return with_rope(config, rope_of(dense))


def cohere2_moe(dense: Config, num_experts: int, top_k: int) -> Config:
    """Cohere 2 MoE with experts in every layer and no shared expert."""
    config = _moe(dense, "cohere2_moe", "Cohere2MoeForCausalLM")
    config |= carried(dense, "logit_scale layer_norm_eps sliding_window layer_types")
    config.pop("rms_norm_eps", None)
    head_dim = dense.get("head_dim") or dense["hidden_size"] // dense["num_attention_heads"]
    config |= {
        "head_dim": head_dim,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "num_shared_experts": 0,
        "expert_selection_fn": "softmax",
        "norm_topk_prob": True,
        "mlp_layer_types": ["sparse"] * dense["num_hidden_layers"],
    }
    return with_rope(config, rope_of(dense))


def hunyuan_v1_moe(dense: Config, num_experts: int, top_k: int) -> Config:
    """HunYuan MoE: the shared MLP is as wide as an expert, and zero."""
    config = _moe(dense, "hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM") | carried(dense, "eod_token_id pretraining_tp")
    config |= {"num_experts": num_experts, "moe_topk": top_k}
    return with_rope(config, rope_of(dense))


def qwen3_5_moe(dense: Config, num_experts: int, top_k: int) -> Config:
    """Qwen3.5-MoE, text only: linear attention in most layers; a shared expert, which is zero."""
    config = _moe(dense, "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM") | carried(dense, LINEAR_ATTENTION)
    config |= {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": dense["intermediate_size"],
        "shared_expert_intermediate_size": ZERO_SHARED_EXPERT_SIZE,
    }
    return with_rope(config, rope_of(dense))
