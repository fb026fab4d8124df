"""The families: one entry each. To add one, add an entry here, and a config to tests/test_families.py if it has any
variant of its own; the tests there cover the rest."""

from __future__ import annotations

from btx.choices.families import configs
from btx.choices.families.family import Config, Family, Filled

LAYER = "model.layers.{layer}."
ROLES_OF_PROJECTIONS = {role: f"{LAYER}mlp.{role}_proj.weight" for role in ("gate", "up", "down")}
# Layouts: the FF sublayer in the dense class, experts and router in the MoE class.
MIXTRAL = (ROLES_OF_PROJECTIONS, {
    f"{LAYER}block_sparse_moe.experts.{{expert}}.{name}.weight": (role,)
    for name, role in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
}, f"{LAYER}block_sparse_moe.gate.weight")  # fmt: skip
QWEN_EXPERTS = {f"{LAYER}mlp.experts.{{expert}}.{role}_proj.weight": (role,) for role in ("gate", "up", "down")}
QWEN = (ROLES_OF_PROJECTIONS, QWEN_EXPERTS, f"{LAYER}mlp.gate.weight")
GRANITE = (ROLES_OF_PROJECTIONS, {
    f"{LAYER}block_sparse_moe.input_linear.weight": ("gate", "up"),
    f"{LAYER}block_sparse_moe.output_linear.weight": ("down",),
}, f"{LAYER}block_sparse_moe.router.layer.weight")  # fmt: skip
# GraniteMoE-SWA is published as transformers keeps it in memory: it has no older layout.
GRANITE_SWA = (ROLES_OF_PROJECTIONS, {
    f"{LAYER}block_sparse_moe.experts.gate_up_proj": ("gate", "up"),
    f"{LAYER}block_sparse_moe.experts.down_proj": ("down",),
}, f"{LAYER}block_sparse_moe.router.weight")  # fmt: skip
ROPES = "tied embeddings, head_dim, every rope scaling"


def _no_biases(dense: Config) -> str | None:
    """Neither Mixtral's attention nor its experts have biases."""
    attention = "attention_bias: Mixtral's attention has no biases" if dense.get("attention_bias") else None
    return _no_mlp_bias(dense) or attention


def _no_mlp_bias(dense: Config) -> str | None:
    return "mlp_bias: no MoE class has biases in its experts" if dense.get("mlp_bias") else None


def _one_window(dense: Config) -> str | None:
    if len(set(dense.get("layer_types") or ["all"])) > 1 and dense.get("sliding_window"):
        return "layer_types: Mixtral has a sliding window in all layers or in none"
    return None


def _phi3(dense: Config) -> str | None:
    rope = configs.rope_of(dense)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"partial_rotary_factor {rope['partial_rotary_factor']}: Mixtral rotates whole heads"
    if rope.get("rope_type") == "longrope":
        return "longrope: Mixtral reads its lengths elsewhere than Phi-3 and computes other frequencies"
    return None


def _seed_oss(dense: Config) -> str | None:
    if dense.get("attention_out_bias"):
        return "attention_out_bias: Qwen2-MoE has no bias on the attention's output"
    return _no_mlp_bias(dense)


def _full_attention_only(dense: Config) -> str | None:
    if dense.get("sliding_window") and "sliding_attention" in (dense.get("layer_types") or ()):
        return "sliding window: this class attends to everything in every layer"
    return None


def _any_window(dense: Config) -> str | None:
    return None if _full_attention_only(dense) else "no sliding window"


def _olmo3(dense: Config) -> str | None:
    if "sliding_attention" in (dense.get("layer_types") or ()):
        return "layer_types: FlexOlmo has full attention in every layer; OLMo 3 with sliding windows has no MoE class"
    return None


def _ernie(dense: Config) -> str | None:
    return "use_bias: the experts have no biases" if dense.get("use_bias") else None


def _phi3_fused(dense: Config) -> dict[str, dict[str, int]]:
    head_dim = dense.get("head_dim") or dense["hidden_size"] // dense["num_attention_heads"]
    rows = {"q": dense["num_attention_heads"], "k": dense["num_key_value_heads"], "v": dense["num_key_value_heads"]}
    return {
        f"{LAYER}self_attn.qkv_proj.weight": {
            f"{LAYER}self_attn.{part}_proj.weight": heads * head_dim for part, heads in rows.items()
        },
        f"{LAYER}mlp.gate_up_proj.weight": {
            ROLES_OF_PROJECTIONS[role]: dense["intermediate_size"] for role in ("gate", "up")
        },
    }


def _zero_mlp(name: str, width: int, hidden_size: int) -> dict[str, Filled]:
    """A gated feed-forward layer that adds nothing, beside the experts."""
    return {
        f"{LAYER}mlp.{name}.gate_proj.weight": Filled((width, hidden_size)),
        f"{LAYER}mlp.{name}.up_proj.weight": Filled((width, hidden_size)),
        f"{LAYER}mlp.{name}.down_proj.weight": Filled((hidden_size, width)),
    }


def _shared_expert(moe: Config) -> dict[str, Filled]:
    hidden_size = moe["hidden_size"]
    return {
        **_zero_mlp("shared_expert", moe["shared_expert_intermediate_size"], hidden_size),
        # Any number does, as what it weights is zero; but llama.cpp computes sigmoid(x) as silu(x) / x: 0 gives NaN.
        f"{LAYER}mlp.shared_expert_gate.weight": Filled((1, hidden_size), 1 / hidden_size),
    }


def _hunyuan_shared(moe: Config) -> dict[str, Filled]:
    return _zero_mlp("shared_mlp", moe["intermediate_size"], moe["hidden_size"])


def _ernie_bias(moe: Config) -> dict[str, Filled]:
    return {f"{LAYER}mlp.moe_statics.e_score_correction_bias": Filled((1, moe["moe_num_experts"]))}


FAMILIES: tuple[Family, ...] = (
    Family(
        "llama", "mixtral", *MIXTRAL, configs.mixtral, _no_biases, exact=f"base, {ROPES}, gelu",
        notes="vLLM and llama.cpp compute SiLU whatever hidden_act says",
    ),
    Family(
        "llama", "granitemoe", *GRANITE, configs.granitemoe_of_llama, _no_mlp_bias, finetunes=False,
        exact="attention_bias", notes="vLLM leaves the biases out",
    ),
    Family(
        "mistral", "mixtral", *MIXTRAL, configs.mixtral, _no_biases, exact="full, sliding window, head_dim",
        notes="vLLM's Mixtral has no sliding window",
    ),
    Family(
        "ministral", "mixtral", *MIXTRAL, configs.mixtral_of_ministral, _one_window,
        exact="one kind of attention in all layers",
    ),
    Family(
        "ministral3", "mixtral", *MIXTRAL, configs.mixtral_of_ministral3, exact="up to the original context length",
        notes="queries beyond it are scaled, which Mixtral cannot",
    ),
    Family(
        "internlm3", "mixtral", *MIXTRAL, configs.mixtral, _no_biases, exact="base, head_dim",
    ),
    Family(
        "iquestcoder", "mixtral", *MIXTRAL, configs.mixtral, _no_biases, exact="base, head_dim",
    ),
    Family(
        "phi3", "mixtral", *MIXTRAL, configs.mixtral, _phi3, fused=_phi3_fused, exact="full, sliding window",
        notes="qkv_proj and gate_up_proj are taken apart",
    ),
    Family(
        "qwen2", "qwen2_moe", *QWEN, configs.qwen2_moe, inert=_shared_expert, probability_gates=True,
        exact="base, tied embeddings, yarn, windows in some layers",
        notes="the shared expert is zero; llama.cpp does not normalise the gates",
    ),
    Family(
        "seed_oss", "qwen2_moe", *QWEN, configs.qwen2_moe, _seed_oss, inert=_shared_expert, probability_gates=True,
        exact="base, without biases", notes="the shared expert is zero",
    ),
    Family(
        "qwen3", "qwen3_moe", *QWEN, configs.qwen3_moe, _full_attention_only, probability_gates=True,
        exact="base, tied embeddings, attention_bias, yarn",
    ),
    Family(
        "qwen3", "mellum", *QWEN, configs.mellum, _any_window, probability_gates=True, exact="windows in some layers",
        notes="needs transformers 5",
    ),
    Family(
        "olmo2", "flex_olmo", *QWEN, configs.flex_olmo, probability_gates=True, exact="base, tied embeddings",
    ),
    Family(
        "olmo3", "flex_olmo", *QWEN, configs.flex_olmo, _olmo3, probability_gates=True,
        exact="full attention in every layer",
    ),
    Family(
        "granite", "granitemoe", *GRANITE, configs.granitemoe, _no_mlp_bias, finetunes=False,
        exact="multipliers, tied embeddings, attention_bias",
    ),
    Family(
        "granite_swa", "granitemoe_swa", *GRANITE_SWA, configs.granitemoe_swa, _no_mlp_bias, finetunes=False,
        exact="multipliers, windows, sinks", notes="needs transformers 5",
    ),
    Family(
        "ernie4_5", "ernie4_5_moe", *QWEN, configs.ernie4_5_moe, _ernie, inert=_ernie_bias, finetunes=False,
        exact="base, tied embeddings",
    ),
    Family(
        "cohere2", "cohere2_moe", *QWEN, configs.cohere2_moe, exact="windows in some layers, attention_bias",
        notes="needs transformers 5",
    ),
    Family(
        "hunyuan_v1_dense", "hunyuan_v1_moe", ROLES_OF_PROJECTIONS, QWEN_EXPERTS, f"{LAYER}mlp.gate.wg.weight",
        configs.hunyuan_v1_moe, inert=_hunyuan_shared, finetunes=False, exact="base, tied embeddings, attention_bias",
        notes="a zero shared MLP as wide as an expert",
    ),
    Family(
        "qwen3_5_text", "qwen3_5_moe_text", *QWEN, configs.qwen3_5_moe, inert=_shared_expert,
        exact="base, linear attention", notes="the shared expert is zero; needs transformers 5",
    ),
)  # fmt: skip

REFUSED: dict[str, str] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "norms before and after the FF, scaled embeddings"),
    **dict.fromkeys(("gpt2", "gpt_neox", "gpt_bigcode", "phi", "starcoder2", "arcee", "apertus"),
                    "an FF without a gate; no MoE class has such experts with this attention"),
    **dict.fromkeys(("stablelm", "olmo"), "LayerNorms that no MoE class has"),
    **dict.fromkeys(("glm", "glm4"), "rotates half of each head; no MoE class does so with this layer"),
    "exaone4": "norms behind the sublayers, rope in some layers only",
    "smollm3": "rope in some layers only",
}  # fmt: skip
"""Dense classes that were tried and cannot be expressed → why."""
