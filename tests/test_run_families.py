"""A run whose seed model is no Llama: every stage, and a result that transformers alone reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from btx.errors import CheckpointError
from btx.models.loading import load_model
from btx.moe.layer import moe_blocks
from btx.running.preflight import preflight
from tests.pico_run import pico_recipe, run_here


@pytest.mark.parametrize(("dense", "moe"), [
    ("qwen2", "qwen2_moe"), pytest.param("qwen3", "qwen3_moe", marks=pytest.mark.long),
])  # fmt: skip
def test_a_run_on_another_family_ends_with_a_plain_model_of_its_moe_class(tmp_path: Path, dense: str, moe: str) -> None:
    config = "{model_type: %s, hidden_size: 32, num_hidden_layers: 2, intermediate_size: 48, num_attention_heads: 4, " \
             "num_key_value_heads: 2, head_dim: 8, max_position_embeddings: 64}"  # fmt: skip
    recipe = pico_recipe(tmp_path, "run", "seed_model.config=" + config % dense, "train.trainable=feed_forward")
    preflight(recipe)
    run, _ = run_here(recipe, ["data", "seed", "train/birds", "train/tools", "mix", "finetune"])
    folder = run.model("finetune")
    assert json.loads((folder / "config.json").read_text())["norm_topk_prob"] is True
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert model.config.model_type == moe
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "model.layers.1.mlp.experts.2.down_proj.weight" in set(file.keys())
        if dense == "qwen2":  # the shared expert stays out of it
            assert not file.get_tensor("model.layers.1.mlp.shared_expert.down_proj.weight").any()
    ids = torch.arange(30)[None]
    ours = load_model(folder)
    assert len(moe_blocks(ours)) == 2
    with torch.no_grad():
        assert (ours(ids).logits - model(ids).logits).abs().max() < 1e-5


def test_a_family_that_cannot_be_finetuned_is_refused_before_anything_runs(tmp_path: Path) -> None:
    config = "{model_type: granite, hidden_size: 32, num_hidden_layers: 2, intermediate_size: 48, " \
             "num_attention_heads: 4}"  # fmt: skip
    with pytest.raises(CheckpointError, match=r"granite mixes into granitemoe, which btx cannot finetune yet; .*llama"):
        preflight(pico_recipe(tmp_path, "run", f"seed_model.config={config}"))
