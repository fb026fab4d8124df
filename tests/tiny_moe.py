"""Tiny MoE models of many families, by transformers' own classes: experts shared and not, K of 1 to 4, dense layers,
convolutions, sigmoid scores with a bias, groups of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from btx.models.loading import quiet_transformers
from tests.pico_models import SIZES, tokenizer

LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
          "num_key_value_heads": 4}  # fmt: skip
SHARED = {"n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 24}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
                  "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1, **SHARED, **LATENT},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, **SHARED},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 16},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8,
                    "interleave_moe_layer_step": 1},
    "lfm2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_dense_layers": 1,
                 "layer_types": ["full_attention", "conv"]},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": [2, 2], "moe_intermediate_size": [24, 24], "head_dim": 8},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24,
                    "head_dim": 8, "global_head_dim": 8, "sliding_window": 16, "hidden_size_per_layer_input": 0,
                    "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip


def tiny_moe(kind: str, folder: Path) -> Path:
    """A folder of the class, with tokenizer."""
    quiet_transformers()
    config = AutoConfig.for_model(kind, vocab_size=320, bos_token_id=0, eos_token_id=0, pad_token_id=0,
                                  **(SIZES | MOE[kind]))  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
