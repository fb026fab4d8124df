"""Every family against plain transformers: what the MoE computes is what the dense models compute."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from btx.choices.families import FAMILIES, family_of, family_table
from btx.errors import CheckpointError
from btx.mixing.mix import mix
from btx.models.loading import load_model, quiet_transformers

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 2e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e3,
          "original_max_position_embeddings": 32}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
TIED = {"tie_word_embeddings": True}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 2.0}
MINISTRAL3 = YARN | {"llama_4_scaling_beta": 0.1, "max_position_embeddings": 128, "beta_fast": 32.0, "beta_slow": 1.0,
                     "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 64}  # fmt: skip

VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "mixtral", {}),
    ("llama", "mixtral", TIED | {"head_dim": 16}),
    ("llama", "mixtral", {"rope_parameters": LLAMA3}),
    ("llama", "mixtral", {"rope_parameters": YARN}),
    ("llama", "mixtral", {"rope_parameters": LINEAR, "hidden_act": "gelu"}),
    ("llama", "granitemoe", {"attention_bias": True}),
    ("llama", "granitemoe", {"attention_bias": True, "head_dim": 16, "rope_parameters": LLAMA3} | TIED),
    ("mistral", "mixtral", {"sliding_window": None}),
    ("mistral", "mixtral", {"sliding_window": 8, "head_dim": 16}),
    ("ministral", "mixtral", {"head_dim": 8, "sliding_window": 8}),
    ("ministral", "mixtral", {"head_dim": 16, "layer_types": ["full_attention"] * 4}),
    ("ministral3", "mixtral", {"head_dim": 8, "rope_parameters": MINISTRAL3}),
    ("internlm3", "mixtral", {"head_dim": 16}),
    ("iquestcoder", "mixtral", {"head_dim": 8}),
    ("phi3", "mixtral", {}),
    ("phi3", "mixtral", {"sliding_window": 8} | TIED),
    ("qwen2", "qwen2_moe", {}),
    ("qwen2", "qwen2_moe", TIED | {"rope_parameters": YARN}),
    ("qwen2", "qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ("seed_oss", "qwen2_moe", {"head_dim": 16}),
    ("seed_oss", "qwen2_moe", {"head_dim": 8, "attention_bias": False}),
    ("qwen3", "qwen3_moe", {"head_dim": 16}),
    ("qwen3", "qwen3_moe", TIED | {"head_dim": 8, "attention_bias": True, "rope_parameters": YARN}),
    ("qwen3", "mellum", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ("qwen3", "mellum", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    ("olmo2", "flex_olmo", {}),
    ("olmo2", "flex_olmo", TIED | {"attention_bias": True}),
    ("olmo3", "flex_olmo", {"layer_types": ["full_attention"] * 4}),
    ("granite", "granitemoe", GRANITE),
    ("granite", "granitemoe", GRANITE | TIED | {"attention_bias": True, "rope_parameters": YARN}),
    ("granite_swa", "granitemoe_swa", GRANITE | {"sliding_window": 8, "layer_rope_theta": [0, 1e4, 5e3, 1e4]}),
    ("ernie4_5", "ernie4_5_moe", {"head_dim": 16}),
    ("ernie4_5", "ernie4_5_moe", {"head_dim": 8, "tie_word_embeddings": False}),
    ("cohere2", "cohere2_moe", {"sliding_window": 8, "logit_scale": 0.3, "layer_types": SLIDING}),
    ("cohere2", "cohere2_moe", {"sliding_window": 8, "logit_scale": 0.5, "attention_bias": True}),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", {"head_dim": 8}),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", TIED | {"attention_bias": True, "head_dim": 16}),
    ("qwen3_5_text", "qwen3_5_moe_text", {
        "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }),
]  # fmt: skip
IDS = [f"{dense}-{moe}-{number}" for number, (dense, moe, _) in enumerate(VARIANTS)]
FIRST = {(dense, moe): (dense, moe, config) for dense, moe, config in reversed(VARIANTS)}
every_variant = pytest.mark.parametrize(("dense", "moe", "config"), [
    pytest.param(*variant, marks=() if variant == FIRST[variant[:2]] else pytest.mark.long, id=name)
    for variant, name in zip(VARIANTS, IDS, strict=True)
])  # fmt: skip
"""Every family; its other settings in the long tests."""
A_CLASS = {moe: dense for dense, moe in reversed(FIRST)}
every_family = pytest.mark.parametrize(("dense", "moe", "config"), [
    pytest.param(*variant, marks=() if A_CLASS[moe] == dense else pytest.mark.long, id=f"{dense}-{moe}")
    for (dense, moe), variant in FIRST.items()
])  # fmt: skip
"""Every MoE class from one dense family; from its others in the long tests."""


def make(folder: Path, dense: str, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """A pico dense model, everything random: with norms and biases at their defaults wrong mappings look right."""
    folder.mkdir()
    for name, content in _made(dense, json.dumps(config), dtype).items():
        (folder / name).write_bytes(content)
    return folder


@cache
def _made(dense: str, config_json: str, dtype: torch.dtype) -> dict[str, bytes]:
    """The model's files. Several tests begin with the same model."""
    config = json.loads(config_json)
    quiet_transformers()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(dense, **(SIZES | config)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(float(parameter.dim() == 1), 0.2)
    with tempfile.TemporaryDirectory() as folder:
        model.to(dtype).save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def branch(seed: Path, folder: Path, rng_seed: int) -> Path:
    """The seed model with other FF weights."""
    folder.mkdir()
    config = json.loads((seed / "config.json").read_text())
    tensors = load_file(seed / "model.safetensors")
    generator = torch.Generator().manual_seed(rng_seed)
    for name in sorted(tensors):
        if family_of(config, "").is_feed_forward(name, config):
            tensors[name] = torch.randn(tensors[name].shape, generator=generator) * 0.2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(2, 96, (2, 48), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of two tensors of logits, in units of the largest logit if that is more than 1."""
    return float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def plain(folder: Path, **options: Any) -> torch.nn.Module:
    """The model by transformers alone; every tensor of the folder has to be used, none may be missing."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def routers(model: torch.nn.Module, num_experts: int) -> Iterator[torch.nn.Parameter]:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and len(parameter) == num_experts and any(x in name for x in ("gate.w", "router.w")):
            yield parameter


@every_variant
def test_identical_experts_reproduce_the_dense_model(
    tmp_path: Path, dense: str, moe: str, config: dict[str, Any]
) -> None:
    seed = make(tmp_path / "seed", dense, config)
    mix(seed, {"a": seed, "b": seed}, tmp_path / "moe")
    model = plain(tmp_path / "moe")
    assert model.config.model_type == moe
    expected = logits(plain(seed))
    assert expected.std() > 0.1
    assert difference(logits(model), expected) < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(plain(tmp_path / "again")), logits(model))
    assert difference(logits(load_model(tmp_path / "moe")), expected) < 1e-5


@every_family
def test_a_router_forced_to_one_expert_reproduces_that_expert(
    tmp_path: Path, dense: str, moe: str, config: dict[str, Any]
) -> None:
    seed = make(tmp_path / "seed", dense, config)
    experts = {name: branch(seed, tmp_path / name, number) for number, name in enumerate("ab", start=1)}
    mix(seed, experts, tmp_path / "moe", top_k=1)
    model = plain(tmp_path / "moe")
    found = list(routers(model, 3))
    assert len(found) == 4
    for chosen, folder in enumerate([*experts.values(), seed]):
        for block in model.modules():
            force(block, chosen)
        expected = logits(plain(folder))
        assert difference(logits(model), expected) < 1e-5


@pytest.mark.parametrize("dense", ["qwen2", "qwen3_5_text", "hunyuan_v1_dense"])
def test_a_shared_expert_that_is_not_zero_is_kept(tmp_path: Path, dense: str) -> None:
    config = next(config for family, _, config in VARIANTS if family == dense)
    seed = make(tmp_path / "seed", dense, config)
    mix(seed, {"a": seed}, tmp_path / "moe")
    file = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "mlp.shared" in name:
            tensor.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    save_file(tensors, file, metadata={"format": "pt"})
    expected = logits(plain(tmp_path / "moe"))
    assert difference(expected, logits(plain(seed))) > 1e-2
    assert difference(logits(load_model(tmp_path / "moe")), expected) < 1e-5


def force(block: torch.nn.Module, chosen: int) -> None:
    """Send every token to one expert, whatever it looks like."""
    if hasattr(block, "gate_up_proj") and block.gate_up_proj.dim() == 3:
        compute = type(block).forward
        block.forward = lambda x, ids, gates: compute(block, x, torch.full_like(ids, chosen), torch.ones_like(gates))


@pytest.mark.long
@every_family
def test_bfloat16_models_are_reproduced_within_rounding(
    tmp_path: Path, dense: str, moe: str, config: dict[str, Any]
) -> None:
    seed = make(tmp_path / "seed", dense, config, torch.bfloat16)
    mix(seed, {"a": seed, "b": seed}, tmp_path / "moe")
    assert {tensor.dtype for tensor in load_file(tmp_path / "moe" / "model.safetensors").values()} == {torch.bfloat16}
    exact = logits(plain(seed, dtype=torch.float32))
    error = (logits(plain(seed, dtype=torch.bfloat16)) - exact).abs().max()
    assert (logits(plain(tmp_path / "moe", dtype=torch.bfloat16)) - exact).abs().max() < 2 * error
    assert (logits(plain(tmp_path / "moe", dtype=torch.float32)) - exact).abs().max() < 1e-4


def test_every_entry_of_the_table_is_tested() -> None:
    assert {(family.dense, family.moe) for family in FAMILIES} == set(FIRST)
    assert set(family_table()) == {family.dense for family in FAMILIES}


@pytest.mark.parametrize(("config", "reason"), [
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias: no MoE class has biases in its experts"),
    ({"model_type": "gemma2"}, "norms before and after the FF"),
    ({"model_type": "gpt2"}, "an FF without a gate"),
    ({"model_type": "ministral", "sliding_window": 8, "layer_types": SLIDING}, "in all layers or in none"),
    ({"model_type": "olmo3", "sliding_window": 8, "layer_types": SLIDING}, "OLMo 3 with sliding windows"),
    ({"model_type": "phi3", "rope_parameters": {"partial_rotary_factor": 0.75, "rope_theta": 1e4}}, "whole heads"),
    ({"model_type": "seed_oss", "attention_out_bias": True}, "attention_out_bias"),
    ({"model_type": "ernie4_5", "use_bias": True}, "use_bias"),
    ({}, "'None' cannot be mixed; families: cohere2, ernie4_5, granite"),
])  # fmt: skip
def test_what_no_moe_class_can_express_is_refused_with_the_reason(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        family_of(config, "seed")
