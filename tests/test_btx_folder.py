"""Folders with a router that the plain class cannot express: plain readers refuse them, ours reads them as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM

from btx.choices.routers import RoutingRule
from btx.errors import CheckpointError
from btx.model_files.btx_folder import write_router
from btx.models.loading import load_model, load_tokenizer, read_config, save_model
from btx.moe.layer import moe_blocks, set_router
from tests.pico_models import mixtral

IDS = torch.arange(5, 65).view(2, 30)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("routers")
    plain = mixtral(root / "plain", top_k=1)
    made = {"plain": plain}
    for kind in ("switch", "sample_top1"):
        made[kind] = root / kind
        shutil.copytree(plain, made[kind])
        assert write_router(made[kind], RoutingRule(kind, capacity_factor=1.25, temperature_rate=0.01))
    return made


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", ["switch", "sample_top1"])
def test_plain_readers_refuse_the_folder_aloud(folders: dict[str, Path], kind: str) -> None:
    for read in (AutoModelForCausalLM.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises((ValueError, KeyError), match="btx_mixtral"):
            read(folders[kind])
    with pytest.raises(Exception, match="num_experts_per_tok"):
        MixtralForCausalLM.from_pretrained(folders[kind])


def test_our_loader_routes_as_the_folder_says(folders: dict[str, Path]) -> None:
    plain = logits(load_model(folders["plain"]))
    for kind in ("switch", "sample_top1"):
        model = load_model(folders[kind])
        assert {block.rule.rule for block in moe_blocks(model)} == {
            RoutingRule(kind, capacity_factor=1.25, temperature_rate=0.01)
        }
        other = load_model(folders["plain"])
        set_router(other, RoutingRule(kind))
        assert torch.equal(logits(model), logits(other))
        assert (logits(model) - plain).abs().max() > 0.1
    assert load_tokenizer(folders["switch"]).eos_token_id is not None
    assert read_config(folders["switch"])["num_experts_per_tok"] == 1


def test_a_trained_model_keeps_the_router_of_the_one_it_started_from(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(folders["switch"])
    with torch.no_grad():
        moe_blocks(model)[0].gate.weight.mul_(-1)
    (tmp_path / "again").mkdir()
    save_model(model, tmp_path / "again", like=folders["switch"], tokenizer=load_tokenizer(folders["switch"]))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "btx_mixtral"
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(model))


def test_sample_top1_without_a_soft_first_layer_is_a_plain_model(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = RoutingRule("sample_top1", soft_first_layer=False)
    shutil.copytree(folders["plain"], tmp_path / "copy")
    assert not write_router(tmp_path / "copy", settings)
    ours = load_model(tmp_path / "copy")
    set_router(ours, settings)
    assert torch.allclose(logits(ours), logits(MixtralForCausalLM.from_pretrained(tmp_path / "copy")), atol=1e-4)


def test_switch_is_a_plain_model_of_a_class_whose_gates_are_probabilities(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        hidden_size=32, num_hidden_layers=2, moe_intermediate_size=48, vocab_size=320, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=1, norm_topk_prob=True,
    ))  # fmt: skip
    model.save_pretrained(tmp_path)
    assert not write_router(tmp_path, RoutingRule("switch"))
    ours, plain = load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {block.rule.rule.kind for block in moe_blocks(ours)} == {"switch"}
    assert (logits(ours) - logits(plain)).abs().max() < 1e-5
    assert (logits(plain) - logits(model)).abs().max() > 1e-3  # the gate was 1 before
    assert not write_router(tmp_path, RoutingRule("top_k", top_k=1))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_soft_is_a_plain_model_with_all_experts(tmp_path: Path) -> None:
    plain = mixtral(tmp_path / "soft", top_k=4)
    ours = load_model(plain)
    set_router(ours, RoutingRule("soft"))
    assert torch.allclose(logits(ours), logits(MixtralForCausalLM.from_pretrained(plain)), atol=1e-4)


@pytest.mark.parametrize("text", [
    None, "{", "[]", '{"format": 2}', '{"format": 1, "config": {}, "router": {"kind": "x"}}',
])  # fmt: skip
def test_a_missing_or_broken_description_is_refused(folders: dict[str, Path], tmp_path: Path, text: str | None) -> None:
    shutil.copytree(folders["switch"], tmp_path / "broken")
    (tmp_path / "broken" / "btx.json").unlink()
    if text is not None:
        (tmp_path / "broken" / "btx.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"btx\.json"):
        load_model(tmp_path / "broken")
