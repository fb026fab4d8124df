"""A folder is exactly its class, or everything that opens models refuses it by name: file, tensor, key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from btx.errors import CheckpointError
from btx.mixing.drop import drop
from btx.mixing.extend import extend
from btx.mixing.mix import mix, soup
from btx.model_files.model_folder import check_model_folder
from btx.models.configs import read_config
from btx.models.loading import load_model, load_tokenizer, quiet_transformers, save_model
from btx.models.whole import check_whole, class_tensors
from btx.stages.seed import check_planned
from tests.conftest import PICO_LLAMA
from tests.test_families import every_family, make

MakeLlama = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
GATE = "model.layers.1.mlp.gate_proj.weight"
W1 = "model.layers.1.block_sparse_moe.experts.1.w1.weight"


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configure(folder: Path, *removed: str, **values: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | values
    for key in removed:
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def moe_of(folder: Path, cls: Any = MixtralForCausalLM, config: Any = MixtralConfig, **values: Any) -> Path:
    """A pico MoE model, as transformers saves it."""
    quiet_transformers()
    defaults = {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cls(config(**(PICO_LLAMA | defaults | values))).save_pretrained(folder)
    return folder


def message(action: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    return str(caught.value)


def numbers(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(1, 40)[None]).logits


@every_family
def test_the_tensors_of_a_class_are_those_that_save_pretrained_writes(
    tmp_path: Path, dense: str, moe: str, config: dict[str, Any]
) -> None:
    seed = make(tmp_path / "seed", dense, config)
    mix(seed, {"a": seed}, tmp_path / "moe")
    AutoModelForCausalLM.from_pretrained(tmp_path / "moe").save_pretrained(tmp_path / "again")
    for folder in (seed, tmp_path / "moe", tmp_path / "again"):
        shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
        assert class_tensors(read_config(folder)).published == shapes


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t | {GATE: t[GATE].to(torch.int8)}, f"{GATE} is of type I8"),
    (lambda t: t | {GATE: t[GATE].to(torch.float8_e4m3fn)}, f"{GATE} is of type F8_E4M3"),
    (lambda t: t | {GATE + "_scale": torch.ones(1)}, f"has 1 tensor: {GATE}_scale, unlike what"),
    (lambda t: {n: v for n, v in t.items() if "q_proj" not in n}, "lacks 2 tensors: model.layers.0.self_attn.q_proj"),
    (lambda t: t | {GATE: t[GATE][:, :8].clone()}, "config.json asks for has (48, 32)"),
])  # fmt: skip
def test_a_dense_model_is_refused_alike_wherever_it_goes(
    make_llama: MakeLlama, tmp_path: Path, change: Callable[[Tensors], Tensors], words: str
) -> None:
    seed, moe = make_llama("seed"), moe_of(tmp_path / "moe")
    bad = edit(make_llama("bad", 1), change)
    out = tmp_path / "out"
    for action in (
        lambda: mix(seed, {"bad": bad}, out), lambda: mix(bad, {"seed": seed}, out),
        lambda: soup(seed, {"bad": bad}, out), lambda: extend(moe, "bad", bad, out), lambda: load_model(bad),
    ):  # fmt: skip
        found = message(action)
        assert words in found
        assert str(bad / "model.safetensors") in found
    assert not out.exists()


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: {n: v for n, v in t.items() if n != W1}, f"lacks 1 tensor: {W1}"),
    (lambda t: t | {W1 + ".absmax": torch.ones(3)}, f"has 1 tensor: {W1}.absmax"),
    (lambda t: t | {W1: t[W1].to(torch.uint8)}, f"{W1} is of type U8"),
    (lambda t: t | {W1: t[W1].T.contiguous()}, f"{W1} is (32, 48), the class that "),
    (lambda t: t | {n.replace("experts.7", "experts.8"): v.clone() for n, v in t.items() if "experts.7" in n},
     "has 6 tensors: model.layers.0.block_sparse_moe.experts.8.w1.weight"),
])  # fmt: skip
def test_a_moe_model_is_refused_alike_wherever_it_goes(
    make_llama: MakeLlama, tmp_path: Path, change: Callable[[Tensors], Tensors], words: str
) -> None:
    bad, law, out = edit(moe_of(tmp_path / "bad"), change), make_llama("law", 1), tmp_path / "out"
    for action in (lambda: extend(bad, "law", law, out), lambda: drop(bad, "1", out), lambda: load_model(bad)):
        found = message(action)
        assert words in found
        assert str(bad / "model.safetensors") in found
    assert not out.exists()


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantised_models_are_refused_by_key(make_llama: MakeLlama, tmp_path: Path, key: str) -> None:
    dense = configure(make_llama("dense"), **{key: {"quant_method": "gptq"}})
    moe = configure(moe_of(tmp_path / "moe"), **{key: {"quant_method": "gptq"}})
    for action in (
        lambda: load_model(dense), lambda: load_model(moe), lambda: drop(moe, "1", tmp_path / "out"),
        lambda: extend(moe_of(tmp_path / "fit"), "law", dense, tmp_path / "out"), lambda: check_model_folder(dense),
    ):  # fmt: skip
        assert f"config.json: {key}: give the unquantised model; these weights are quantised (gptq)" in message(action)


def test_tensors_that_every_family_computes_are_no_weights(make_llama: MakeLlama, tmp_path: Path) -> None:
    old = edit(make_llama("old"), lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    mix(old, {"a": old}, tmp_path / "moe")
    assert not [name for name in load_file(tmp_path / "moe" / "model.safetensors") if "inv_freq" in name]
    moe = edit(tmp_path / "moe", lambda t: t | {"model.rotary_emb.inv_freq": torch.ones(4)})
    extend(moe, "b", make_llama("b", 1), tmp_path / "moe3")
    drop(tmp_path / "moe3", "b", tmp_path / "moe2")


def test_the_layout_of_memory_is_refused_with_both_names_and_the_way_out(make_llama: MakeLlama, tmp_path: Path) -> None:
    published, moe = moe_of(tmp_path / "published"), tmp_path / "moe"
    AutoModelForCausalLM.from_pretrained(published).save_pretrained(moe, save_original_format=False)
    for action in (
        lambda: drop(moe, "1", tmp_path / "out"),
        lambda: extend(moe, "law", make_llama("law"), tmp_path / "out"),
    ):
        found = message(action)
        for words in (str(moe / "model.safetensors"), "has model.layers.0.mlp.experts.down_proj",
                      "block_sparse_moe.experts.0.w1.weight", "NEW_FOLDER"):  # fmt: skip
            assert words in found
    assert torch.equal(numbers(moe), numbers(published))
    load_model(moe)  # transformers reads it, so it can be evaluated
    program = "".join(line.removeprefix("    ") for line in found.splitlines(True) if line.startswith("    "))
    exec(program.replace("NEW_FOLDER", str(tmp_path / "saved")))  # the way out that the message tells
    assert torch.equal(numbers(tmp_path / "saved"), numbers(published))
    drop(tmp_path / "saved", "1", tmp_path / "out")


@pytest.mark.parametrize("values", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}])
def test_dense_layers_among_the_sparse_are_named_by_key_and_layer_and_left_by_drop(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    settings = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "head_dim": 8,
    }
    moe = moe_of(tmp_path / "moe", Qwen3MoeForCausalLM, Qwen3MoeConfig, **settings, **values)
    sizes = {key: value for key, value in PICO_LLAMA.items() if not key.endswith("token_id")}
    dense = make(tmp_path / "dense", "qwen3", sizes | {"head_dim": 8})
    found = message(lambda: extend(moe, "law", dense, tmp_path / "out"))
    ((key, value),) = values.items()
    assert f"{moe / 'config.json'}: " in found
    assert f"{key}: {value}" in found
    assert "layer 0 of the MoE model is dense" in found
    drop(moe, "1", tmp_path / "out")
    old, new = load_file(moe / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(old["model.layers.0.mlp.up_proj.weight"], new["model.layers.0.mlp.up_proj.weight"])
    load_model(tmp_path / "out")


def own_head(folder: Path) -> Path:
    head = torch.randn(320, 32, generator=torch.Generator().manual_seed(1))
    return edit(folder, lambda t: t | {"lm_head.weight": head})


def test_a_head_of_its_own_counts_whatever_the_config_says(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed = own_head(make_llama("seed", tie_word_embeddings=True))
    law = own_head(make_llama("law", 1, tie_word_embeddings=True))
    expected = numbers(seed)
    lines: list[str] = []
    mix(seed, {"a": seed}, tmp_path / "moe", log=lines.append)
    assert any("lm_head.weight" in line and "tie_word_embeddings" in line for line in lines)
    extend(tmp_path / "moe", "law", law, tmp_path / "moe3")
    drop(tmp_path / "moe3", "law", tmp_path / "moe2")
    soup(seed, {"a": seed}, tmp_path / "soup")
    (tmp_path / "branch").mkdir()
    save_model(load_model(seed), tmp_path / "branch", like=seed, tokenizer=load_tokenizer(seed))
    for name in ("moe", "moe2", "soup", "branch"):
        assert torch.allclose(numbers(tmp_path / name), expected, atol=1e-4), name
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is False
    with torch.no_grad():
        assert torch.equal(load_model(seed)(torch.arange(1, 40)[None]).logits, expected)


def test_a_copy_of_the_embeddings_is_no_head_of_its_own(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed = make_llama("seed", tie_word_embeddings=True)
    edit(seed, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    mix(seed, {"a": seed}, tmp_path / "moe")
    edit(tmp_path / "moe", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    extend(tmp_path / "moe", "b", make_llama("b", 1, tie_word_embeddings=True), tmp_path / "moe3")
    assert "lm_head.weight" not in load_file(tmp_path / "moe3" / "model.safetensors")
    assert read_config(tmp_path / "moe3")["tie_word_embeddings"] is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tied_embeddings_are_saved_once_in_every_type(
    make_llama: MakeLlama, tmp_path: Path, dtype: torch.dtype
) -> None:
    seed = make_llama("seed", tie_word_embeddings=True)
    AutoModelForCausalLM.from_pretrained(seed, dtype=dtype).save_pretrained(seed)
    (tmp_path / "out").mkdir()
    save_model(load_model(seed), tmp_path / "out", like=seed, tokenizer=load_tokenizer(seed))
    old, new = load_file(seed / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in old
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) and old[name].dtype == dtype for name in old)


def test_the_type_in_the_files_counts_whatever_the_config_says(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed = configure(make_llama("seed"), dtype="bfloat16")
    norm = "model.norm.weight"
    edit(seed, lambda t: t | {norm: t[norm].to(torch.float64)})
    (tmp_path / "branch").mkdir()
    save_model(load_model(seed, dtype=torch.float64), tmp_path / "branch", like=seed, tokenizer=load_tokenizer(seed))
    old, new = load_file(seed / "model.safetensors"), load_file(tmp_path / "branch" / "model.safetensors")
    assert all(torch.equal(old[name], new[name]) and old[name].dtype == new[name].dtype for name in old)
    assert json.loads((tmp_path / "branch" / "config.json").read_text())["dtype"] == "float32"
    moe = configure(moe_of(tmp_path / "moe"), dtype="bfloat16")
    drop(moe, "1", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_a_tensor_in_two_shards_is_refused(make_llama: MakeLlama) -> None:
    seed = make_llama("seed")
    AutoModelForCausalLM.from_pretrained(seed).save_pretrained(seed, max_shard_size="100KB")
    (seed / "model.safetensors").unlink()
    shards = sorted(seed.glob("model-*.safetensors"))
    first = load_file(shards[0])
    name = sorted(first)[0]
    save_file(load_file(shards[1]) | {name: first[name]}, shards[1], metadata={"format": "pt"})
    assert f"{shards[1]}: holds {name}, which {shards[0]} holds too" in message(lambda: check_model_folder(seed))


def test_a_plan_config_is_compared_by_what_it_means(make_llama: MakeLlama) -> None:
    seed = make_llama("seed", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    found = read_config(seed)
    plan = {"model_type": "llama", **PICO_LLAMA, "head_dim": None, "use_cache": False, "rope_theta": 10000}
    check_planned(plan | {"rope_scaling": {"type": "linear", "factor": 2}}, found)
    assert "rope_parameters" in message(
        lambda: check_planned(plan | {"rope_scaling": {"type": "linear", "factor": 4}}, found)
    )
    assert "hidden_size: 64 planned, 32 found" in message(lambda: check_planned(plan | {"hidden_size": 64}, found))


def test_the_config_of_a_class_that_the_tensors_are_not_of(make_llama: MakeLlama) -> None:
    seed = configure(make_llama("seed"), num_hidden_layers=1)
    assert "has 9 tensors: model.layers.1." in message(lambda: check_whole(seed, read_config(seed)))
