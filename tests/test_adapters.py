"""Adapters of the seed model given as experts: merged while they are read, and the same model as when merged before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from btx.errors import CheckpointError
from btx.mixing.checks import open_checked
from btx.mixing.extend import extend
from btx.mixing.mix import mix
from btx.model_files.adapter_folder import AdapterFolder
from btx.model_files.shard_writer import OutputTensor, write_shards
from tests.adapters import ATTENTION, FEED_FORWARD, write_adapter
from tests.test_families import make as make_family

Make = Callable[..., Path]


def merged_here(seed: Path, adapter: Path, output: Path, scaling: float) -> Path:
    """The seed model with an adapter of one scaling merged in, the obvious way."""
    shutil.copytree(seed, output)
    weights, tensors = load_file(seed / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in weights:
        a = tensors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if a is not None:
            b = tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            weights[name] = (weights[name].float() + (b @ a) * scaling).to(weights[name].dtype)
    save_file(weights, output / "model.safetensors", {"format": "pt"})
    return output


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders' weights are the same, bit for bit."""
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mix_of_adapters_is_the_mix_of_the_merged_models(make_llama: Make, tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    seed = make_llama("seed")
    if dtype == "bfloat16":
        AutoModelForCausalLM.from_pretrained(seed, dtype=torch.bfloat16).save_pretrained(seed)
    adapters = {
        "law": write_adapter(tmp_path / "law", seed, FEED_FORWARD + ATTENTION),
        "code": write_adapter(tmp_path / "code", seed, noise_seed=2, use_rslora=True),
    }
    merged = {
        "law": merged_here(seed, adapters["law"], tmp_path / "law-merged", 8 / 4),
        "code": merged_here(seed, adapters["code"], tmp_path / "code-merged", 8 / 4**0.5),
    }
    lines: list[str] = []
    record = mix(seed, adapters, tmp_path / "moe", log=lines.append)
    mix(seed, merged, tmp_path / "moe-merged")
    assert same_weights(tmp_path / "moe", tmp_path / "moe-merged")
    assert not [line for line in lines if "taken to be" in line], "the seed model is the base that the adapters name"
    inputs = record["inputs"]["law"]
    assert [file["file"] for file in inputs["weights"]] == ["adapter_model.safetensors"]
    assert "adapter_config.json" in inputs["sha256"]


def test_fused_weights_are_merged_before_they_are_taken_apart(tmp_path: Path) -> None:
    seed = make_family(tmp_path / "seed", "phi3", {})
    adapter = write_adapter(tmp_path / "law", seed, ("mlp.gate_up_proj", "mlp.down_proj", "self_attn.qkv_proj"))
    merged = merged_here(seed, adapter, tmp_path / "merged", 2.0)
    mix(seed, {"law": adapter}, tmp_path / "moe")
    mix(seed, {"law": merged}, tmp_path / "moe-merged")
    assert same_weights(tmp_path / "moe", tmp_path / "moe-merged")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_merging_gives_the_bits_of_peft(make_llama: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason='needs pip install "branchtrainmix[lora]"')
    from transformers import AutoModelForCausalLM

    seed = make_llama("seed")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(seed),
        peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "gate_proj", "down_proj"],
                        rank_pattern={"layers.1.mlp.gate_proj": 7}, alpha_pattern={"q_proj": 3, "1.mlp.down_proj": 5}),
    )  # fmt: skip
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "law")
    wanted = model.merge_and_unload().state_dict()
    tensors = open_checked(seed, {"law": tmp_path / "law"}, True).expert_tensors["law"]
    for name in tensors.names:
        assert torch.equal(tensors[name].load(), wanted[name]), name
    before = load_file(seed / "model.safetensors")
    assert sum(not torch.equal(wanted[name], before[name]) for name in tensors.names) == 6


def test_rows_and_blocks_of_a_merged_weight_are_those_of_the_whole(make_llama: Make, tmp_path: Path) -> None:
    seed = make_llama("seed")
    adapter = write_adapter(tmp_path / "law", seed)
    tensor = open_checked(seed, {"law": adapter}, True).expert_tensors["law"]["model.layers.1.mlp.gate_proj.weight"]
    whole = tensor.load()
    assert torch.equal(tensor.rows(5, 9).load(), whole[5:9])
    assert torch.equal(tensor.rows(5, 9).rows(1, 3).finite(2, 40), whole[6:8].flatten()[2:40])
    write_shards(tmp_path, [OutputTensor("w", tensor.shape, tensor.dtype, [tensor])])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], whole)


def test_an_adapter_extends_a_moe_model_as_its_merged_model_does(make_llama: Make, tmp_path: Path) -> None:
    seed = make_llama("seed")
    mix(seed, {"math": make_llama("math", 1)}, tmp_path / "moe")
    adapter = write_adapter(tmp_path / "law", seed, FEED_FORWARD + ATTENTION)
    merged = merged_here(seed, adapter, tmp_path / "merged", 2.0)
    extend(tmp_path / "moe", "law", adapter, tmp_path / "moe3", shared="fold")
    extend(tmp_path / "moe", "law", merged, tmp_path / "moe3-merged", shared="fold")
    assert same_weights(tmp_path / "moe3", tmp_path / "moe3-merged")
    make_llama("seed", 5)
    with pytest.raises(CheckpointError, match=r"seed: holds other weights than those that .*moe was mixed from; merge"):
        extend(tmp_path / "moe", "law", adapter, tmp_path / "moe4")
    shutil.rmtree(seed)
    with pytest.raises(CheckpointError, match="where none is now"):
        extend(tmp_path / "moe", "law", adapter, tmp_path / "moe4")


@pytest.mark.parametrize(("base", "said"), [
    ("org/other", "was trained on org/other; taken to be the same as"),
    (None, "names no base model; taken to be trained on"),
])  # fmt: skip
def test_an_adapter_of_another_name_is_taken_with_a_word(
    make_llama: Make, tmp_path: Path, base: str | None, said: str
) -> None:
    seed, lines = make_llama("seed"), []
    adapter = write_adapter(tmp_path / "law", seed, base_model_name_or_path=base)
    open_checked(seed, {"law": adapter}, True, warn=lines.append)
    assert len(lines) == 1
    assert said in lines[0]


def test_the_hub_cache_knows_the_base_by_its_name(make_llama: Make, tmp_path: Path) -> None:
    cached = make_llama("models--org--base/snapshots/abc")
    lines: list[str] = []
    adapter = write_adapter(tmp_path / "law", cached, base_model_name_or_path="org/base")
    open_checked(cached, {"law": adapter}, True, warn=lines.append)
    assert lines == []


@pytest.mark.parametrize(("config", "problem"), [
    ({"peft_type": "IA3"}, "peft_type 'IA3': of all adapters only LORA"),
    ({"use_dora": True}, "use_dora: True: more than plain LoRA"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "all"}, "biases were trained too"),
    ({"init_lora_weights": "pissa"}, "'pissa': this start changes the base model's weights"),
    ({"something_new": {"a": 1}}, "something_new"),
    ({"r": 5}, "says rank 5"),
    ({"lora_alpha": "many"}, "lora_alpha is 'many'"),
    ({"alpha_pattern": {"(": 2}}, "no regular expression"),
])  # fmt: skip
def test_what_cannot_be_merged_exactly_is_refused_by_name(
    make_llama: Make, tmp_path: Path, config: dict[str, Any], problem: str
) -> None:
    seed = make_llama("seed")
    adapter = write_adapter(tmp_path / "law", seed)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | config), "utf-8")
    with pytest.raises(CheckpointError) as refused:
        open_checked(seed, {"law": adapter}, True)
    assert problem in str(refused.value)
    assert "expert law" in str(refused.value)


@pytest.mark.parametrize(("name", "shape", "problem"), [
    ("model.layers.0.mlp.gate_proj.lora_magnitude_vector", (48,), "no A or B of a linear weight"),
    ("model.embed_tokens.lora_embedding_A", (4, 320), "no A or B of a linear weight"),
    ("lm_head.weight", (320, 32), "no A or B of a linear weight"),
    ("model.layers.0.self_attn.v_proj.lora_A.weight", (4, 32), "an A without B"),
])  # fmt: skip
def test_more_than_a_and_b_in_the_file_is_refused(
    make_llama: Make, tmp_path: Path, name: str, shape: tuple[int, ...], problem: str
) -> None:
    seed = make_llama("seed")
    file = write_adapter(tmp_path / "law", seed) / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{name}": torch.zeros(shape)}, file)
    with pytest.raises(CheckpointError, match=problem):
        AdapterFolder.open(tmp_path / "law")


def test_an_adapter_of_another_model_is_refused_with_its_weights(make_llama: Make, tmp_path: Path) -> None:
    seed, other = make_llama("seed"), make_llama("other", num_hidden_layers=1, hidden_size=64)
    wide = write_adapter(tmp_path / "wide", make_llama("wide-model", intermediate_size=64))
    with pytest.raises(CheckpointError, match=r"would be \(64, 32\), the seed model's is \(48, 32\)"):
        mix(seed, {"law": wide}, tmp_path / "moe")
    with pytest.raises(CheckpointError, match=r"changes model.layers.1.mlp.down_proj.weight.*does not have"):
        mix(other, {"law": write_adapter(tmp_path / "deep", seed)}, tmp_path / "moe")
    tied = make_llama("tied", tie_word_embeddings=True)
    file = write_adapter(tmp_path / "head", tied) / "adapter_model.safetensors"
    head = {f"base_model.model.lm_head.lora_{letter}.weight": torch.zeros(shape)
            for letter, shape in (("A", (4, 32)), ("B", (320, 4)))}  # fmt: skip
    save_file(head, file)
    with pytest.raises(CheckpointError, match=r"changes lm_head.weight, .*as weights of its own"):
        mix(tied, {"law": tmp_path / "head"}, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_pickled_broken_and_linked_adapters_are_refused(make_llama: Make, tmp_path: Path) -> None:
    seed = make_llama("seed")
    adapter = write_adapter(tmp_path / "law", seed)
    file = adapter / "adapter_model.safetensors"
    nan = load_file(file)
    nan["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(nan, file)
    with pytest.raises(CheckpointError, match=r"expert law: .*adapter_model.safetensors: .* holds NaN"):
        mix(seed, {"law": adapter}, tmp_path / "moe")
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="lies outside the model's folder"):
        AdapterFolder.open(adapter)
    file.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="can run code when read; convert them once"):
        AdapterFolder.open(adapter)
