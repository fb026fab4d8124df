"""Dense config → MoE config, family by family."""

from __future__ import annotations

from btx.families.family import Config


def carried(dense: Config, keys: str) -> Config:
    """The named values of a dense config, where it has them."""
    return {key: dense[key] for key in keys.split() if key in dense}


def for_both_transformers(dense: Config) -> Config:
    """Rope and type under the keys of transformers 5 and of transformers 4.

    The rope base is always written out: Llama's default is 1e4, Mixtral's 1e6.
    """
    rope = dense.get("rope_parameters") or {"rope_type": "default", **(dense.get("rope_scaling") or {})}
    rope = {"rope_theta": dense.get("rope_theta", 10000.0), **rope}
    dtype = dense.get("dtype") or dense.get("torch_dtype") or "float32"
    return {
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


# transformers' own balancing loss stays off: it is not the paper's, and plain inference needs none.
ROUTER_LOSS_OFF: Config = {"output_router_logits": False, "router_aux_loss_coef": 0.0}


def mixtral(dense: Config, num_experts: int, top_k: int) -> Config:
    """Mixtral: Llama's layer with experts."""
    keys = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id "
        "eos_token_id tie_word_embeddings attention_dropout"
    )
    return carried(dense, keys) | for_both_transformers(dense) | ROUTER_LOSS_OFF | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
        "sliding_window": None,
        "router_jitter_noise": 0.0,
    }  # fmt: skip
