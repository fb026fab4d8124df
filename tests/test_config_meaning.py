"""What means the same is the same: configs are compared by what they say of the result, not by how they are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from btx.errors import CheckpointError
from btx.mixing.extend import extend
from btx.mixing.mix import mix
from btx.models.config_meaning import differences
from tests.conftest import PICO_LLAMA
from tests.test_families import branch, make

MakeLlama = Callable[..., Path]
PICO = {key: value for key, value in PICO_LLAMA.items() if not key.endswith("token_id")}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
FULL, SLIDING = "full_attention", "sliding_attention"


def config(model_type: str, values: dict[str, Any]) -> dict[str, Any]:
    return AutoConfig.for_model(model_type, **(PICO | values)).to_dict()


@pytest.mark.parametrize(("model_type", "one", "other"), [
    ("llama", {}, {"head_dim": None}),
    ("llama", {"head_dim": 8}, {}),
    ("llama", {"rope_parameters": LINEAR}, {"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 2}}),
    ("llama", {"rope_parameters": LINEAR}, {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("llama", {"rope_parameters": LINEAR}, {"rope_parameters": LINEAR | {"type": "linear"}}),
    ("llama", {}, {"rope_scaling": None, "rope_theta": 10000.0}),
    ("llama", {}, {"rope_scaling": {"type": "linear", "factor": 1.0}, "rope_theta": 10000.0}),
    ("llama", {"rope_parameters": YARN}, {"rope_parameters": YARN | {"beta_fast": 32.0, "beta_slow": 1.0}}),
    ("llama", {"rope_parameters": YARN}, {"rope_parameters": YARN | {"attention_factor": None}}),
    ("llama", {"rms_norm_eps": 1e-6}, {"rms_norm_eps": 9.999999974752427e-07}),
    ("llama", {"hidden_act": "silu"}, {"hidden_act": "swish"}),
    ("llama", {}, {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.1, "pretraining_tp": 2}),
    ("llama", {}, {"use_cache": False, "transformers_version": "4.1.0", "_name_or_path": "x", "torch_dtype": "float16",
                   "output_attentions": True, "initializer_range": 0.1, "unknown_key": 3, "sliding_window": 0}),
    ("llama", {"num_key_value_heads": 4}, {"num_key_value_heads": None}),
    ("mistral", {"sliding_window": None}, {"sliding_window": 0}),
    ("qwen2", {}, {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen2", {"sliding_window": None}, {"layer_types": [FULL] * 2, "max_window_layers": 21}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
     {"use_sliding_window": True, "sliding_window": 8, "layer_types": [FULL, SLIDING]}),
    ("qwen2_moe", {"sliding_window": None}, {"sliding_window": 0, "use_sliding_window": False}),
    ("mixtral", {"sliding_window": None, "head_dim": 8}, {"head_dim": None, "router_jitter_noise": 0.1}),
])  # fmt: skip
def test_the_same_written_in_two_ways(model_type: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    assert differences(config(model_type, one), config(model_type, other)) == {}


@pytest.mark.parametrize(("model_type", "one", "other", "keys"), [
    ("llama", {}, {"head_dim": 16}, {"head_dim"}),
    ("llama", {}, {"rms_norm_eps": 1e-5}, {"rms_norm_eps"}),
    ("llama", {"rope_parameters": LINEAR}, {"rope_parameters": LINEAR | {"factor": 4.0}}, {"rope_parameters"}),
    ("llama", {"rope_parameters": LINEAR}, {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}, {"rope_parameters"}),
    ("llama", {}, {"rope_theta": 5e5}, {"rope_parameters"}),
    ("llama", {}, {"attention_bias": True}, {"attention_bias"}),
    ("llama", {"rope_parameters": YARN}, {"rope_parameters": YARN | {"beta_fast": 16.0}}, {"rope_parameters"}),
    ("mistral", {"sliding_window": 8}, {"sliding_window": None}, {"sliding_window"}),
    ("mistral", {"sliding_window": 8}, {"sliding_window": 16}, {"sliding_window"}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
     {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, {"layer_types"}),
    ("granite", {"logits_scaling": 2.0}, {"logits_scaling": 4.0}, {"logits_scaling"}),
])  # fmt: skip
def test_what_differs_in_effect(model_type: str, one: dict[str, Any], other: dict[str, Any], keys: set[str]) -> None:
    assert differences(config(model_type, one), config(model_type, other)).keys() == keys


def respell(folder: Path, *removed: str, **values: Any) -> Path:
    found = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in found.items() if key not in removed}
    (folder / "config.json").write_text(json.dumps(kept | values))
    return folder


def test_experts_with_configs_of_other_times_mix_and_give_the_same_model(make_llama: MakeLlama, tmp_path: Path) -> None:
    """The output's config has one spelling, whatever the inputs' is."""
    seed, math = (make_llama(name, number, rope_parameters=dict(LINEAR)) for number, name in enumerate(("s", "m")))
    mix(seed, {"m": math}, tmp_path / "new")
    for folder in (seed, math):
        respell(folder, "rope_parameters", "head_dim", rope_theta=10000, rope_scaling={"type": "linear", "factor": 2.0})
        mix(seed, {"m": math}, tmp_path / folder.name / "moe")
        new, old = (
            load_file(path / "model.safetensors") for path in (tmp_path / "new", tmp_path / folder.name / "moe")
        )
        assert new.keys() == old.keys()
        assert all(torch.equal(new[name], old[name]) for name in new)
        rope = json.loads((tmp_path / folder.name / "moe" / "config.json").read_text())["rope_parameters"]
        assert rope == LINEAR


@pytest.mark.parametrize("values", [{"head_dim": None}, {"sliding_window": 0}, {"router_jitter_noise": 0.1},
                                    {"norm_topk_prob": False}, {"output_router_logits": True}])  # fmt: skip
def test_extend_takes_a_moe_model_written_in_another_way(
    make_llama: MakeLlama, tmp_path: Path, values: dict[str, Any]
) -> None:
    mix(make_llama("seed"), {"a": make_llama("a", 1)}, tmp_path / "moe")
    respell(tmp_path / "moe", **values)
    extend(tmp_path / "moe", "b", make_llama("b", 2), tmp_path / "moe3")
    assert json.loads((tmp_path / "moe3" / "config.json").read_text()) | values == json.loads(
        (tmp_path / "moe3" / "config.json").read_text()
    )


@pytest.mark.parametrize("dense", ["qwen2", "phi3", "mistral", "qwen3"])
def test_extend_takes_a_moe_model_that_transformers_has_saved_again(tmp_path: Path, dense: str) -> None:
    seed = make(tmp_path / "seed", dense, {"head_dim": 8} if dense == "qwen3" else {})
    mix(seed, {"a": branch(seed, tmp_path / "a", 1)}, tmp_path / "moe")
    AutoModelForCausalLM.from_pretrained(tmp_path / "moe").save_pretrained(tmp_path / "saved")
    extend(tmp_path / "saved", "b", branch(seed, tmp_path / "b", 2), tmp_path / "moe3")


def test_a_difference_that_may_be_a_slip_says_which_file_to_change(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, longer = make_llama("seed"), make_llama("longer", 1, max_position_embeddings=256)
    with pytest.raises(CheckpointError) as caught:
        mix(seed, {"longer": longer}, tmp_path / "moe")
    assert "max_position_embeddings is 256, the seed model has 128" in str(caught.value)
    assert f"set max_position_embeddings there, or in {seed / 'config.json'}" in str(caught.value)
