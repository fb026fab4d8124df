"""What the paper says about mixing (section 3.2), as tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from btx.mixing.mix import mix, soup
from btx.models.loading import load_model

MakeLlama = Callable[..., Path]


def logits(folder: Path, *, plain: bool = True) -> torch.Tensor:
    """Logits of a fixed batch; `plain` uses transformers alone."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(7))
    model = AutoModelForCausalLM.from_pretrained(folder).eval() if plain else load_model(folder)
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("config", [
    {}, {"tie_word_embeddings": True}, {"head_dim": 16}, {"rope_theta": 500.0}, {"hidden_act": "gelu"},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
])  # fmt: skip
@pytest.mark.parametrize("plain", [True, False])
def test_identical_experts_reproduce_the_seeds_logits(
    make_llama: MakeLlama, tmp_path: Path, config: dict, plain: bool
) -> None:
    if "rope_theta" in config:
        config = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    seed = make_llama("seed", **config)
    mix(seed, {"a": seed, "b": seed, "c": seed}, tmp_path / "moe")
    assert (logits(tmp_path / "moe", plain=plain) - logits(seed)).abs().max() < 1e-5


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_router_forced_to_one_expert_reproduces_that_expert(
    make_llama: MakeLlama, tmp_path: Path, chosen: int
) -> None:
    # Only FF weights differ, so the mean of the shared weights is the seed's and each expert survives whole.
    seed = make_llama("seed")
    folders = {
        name: branch_with_other_feed_forward(seed, tmp_path / name, number) for number, name in enumerate("ab", start=1)
    }
    mix(seed, folders, tmp_path / "moe", top_k=1)
    model = load_model(tmp_path / "moe")
    for block in model.modules():
        if hasattr(block, "gate") and hasattr(block, "experts"):
            block.gate.forward = lambda x: torch.nn.functional.one_hot(torch.full((len(x),), chosen), 3).float()
    ids = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found = model(ids).logits
    assert (found - logits([*folders.values(), seed][chosen])).abs().max() < 1e-5


def branch_with_other_feed_forward(seed: Path, target: Path, noise_seed: int) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(seed)
    torch.manual_seed(noise_seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(seed).save_pretrained(target)
    return target


def test_shared_weights_are_the_mean_and_feed_forward_weights_are_copied_bit_for_bit(
    make_llama: MakeLlama, tmp_path: Path
) -> None:
    paths = {"a": make_llama("a", 1), "b": make_llama("b", 2), "generalist": make_llama("seed")}
    record = mix(paths["generalist"], {"a": paths["a"], "b": paths["b"]}, tmp_path / "moe")
    members = [load_file(path / "model.safetensors") for path in paths.values()]
    mixed = load_file(tmp_path / "moe" / "model.safetensors")
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for name in members[0]:
        if ".mlp." in name:
            layer, projection = name.split(".")[2], name.split(".")[4]
            for expert, member in enumerate(members):
                target = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{names[projection]}.weight"
                assert torch.equal(mixed[target], member[name])
                assert record["tensors"][target]["of"] == list(paths)[expert]
        else:
            exact = torch.stack([member[name].double() for member in members]).mean(dim=0)
            assert torch.allclose(mixed[name].double(), exact, rtol=1e-6, atol=1e-8)
            assert record["tensors"][name]["from"] == "mean"
    assert record["experts"] == ["a", "b", "generalist"]


def test_the_mean_is_taken_in_float32_and_rounded_once() -> None:
    from btx.mixing.merge import mean
    from btx.model_files.lazy_tensors import rounded

    tensors = [torch.randn(1000, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(4)]
    exact = torch.stack([tensor.float() for tensor in tensors]).double().mean(dim=0).float().bfloat16()
    assert torch.equal(rounded(mean(tensors), torch.bfloat16), exact)


def test_routers_are_small_random_and_do_not_depend_on_the_global_generator(
    make_llama: MakeLlama, tmp_path: Path
) -> None:
    seed = make_llama("seed", hidden_size=64)
    torch.manual_seed(1)
    mix(seed, {"a": seed}, tmp_path / "one")
    torch.manual_seed(2)
    mix(seed, {"a": seed}, tmp_path / "two")
    mix(seed, {"a": seed}, tmp_path / "other", rng_seed=5)
    name = "model.layers.{}.block_sparse_moe.gate.weight"
    one, two, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two", "other"))
    assert torch.equal(one[name.format(0)], two[name.format(0)])
    assert not torch.equal(one[name.format(0)], other[name.format(0)])
    assert not torch.equal(one[name.format(0)], one[name.format(1)])
    assert 0.01 < float(one[name.format(0)].std()) < 0.03


def test_the_soup_is_the_mean_of_all_weights(make_llama: MakeLlama, tmp_path: Path) -> None:
    paths = [make_llama("a", 1), make_llama("seed")]
    soup(paths[1], {"a": paths[0]}, tmp_path / "soup")
    members = [load_file(path / "model.safetensors") for path in paths]
    found = load_file(tmp_path / "soup" / "model.safetensors")
    assert found.keys() == members[0].keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, (members[0][name] + members[1][name]) / 2, atol=1e-7)


def test_the_mixed_config_carries_what_transformers_4_needs(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed = make_llama("seed", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    mix(seed, {"a": seed}, tmp_path / "moe")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    assert config["output_router_logits"] is False
    assert config["router_aux_loss_coef"] == 0.0
    assert config["torch_dtype"] == "float32"


def test_the_record_says_of_every_tensor_where_it_came_from_and_how_the_experts_agree(
    make_llama: MakeLlama, tmp_path: Path
) -> None:
    seed, experts = make_llama("seed"), {"a": make_llama("a", 1), "b": make_llama("b", 2)}
    record = mix(seed, experts, tmp_path / "moe")
    tensors = record["tensors"]
    assert tensors.keys() == load_file(tmp_path / "moe" / "model.safetensors").keys()
    dense = {name: [load_file(path / "model.safetensors")[name] for path in (seed, *experts.values())]
             for name in load_file(seed / "model.safetensors")}  # fmt: skip

    def cosine(name: str) -> float:
        start, a, b = (tensor.double().flatten() for tensor in dense[name])
        return float(torch.cosine_similarity(a - start, b - start, dim=0))

    gate = "model.layers.1.mlp.gate_proj.weight"
    for number, member in enumerate(("a", "b", "generalist")):
        origin = tensors[f"model.layers.1.block_sparse_moe.experts.{number}.w1.weight"]
        assert (origin["from"], origin["of"], origin["tensors"]) == ("copy", member, [gate])
    shared = "model.layers.0.self_attn.q_proj.weight"
    assert (tensors[shared]["from"], tensors[shared]["of"]) == ("mean", ["a", "b", "generalist"])
    assert record["drift"].keys() == dense.keys()
    for name in (gate, shared):
        assert record["drift"][name]["mean_cosine"] == pytest.approx(cosine(name), abs=1e-6)
    found = record["diagnostics"]["embeddings"]
    assert found["cosines"] == pytest.approx([cosine("model.embed_tokens.weight")] * 2, abs=1e-6)
    assert found["mean_cosine"] == pytest.approx(cosine("model.embed_tokens.weight"), abs=1e-6)


def test_the_record_grows_no_faster_than_the_weights(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, experts = make_llama("seed"), [make_llama(name, number) for number, name in enumerate("abcd", 1)]
    sizes = []
    for copies in (2, 4, 8):  # 8, 16 and 32 experts
        mix(seed, {f"e{n}{m}": path for n, path in enumerate(experts) for m in range(copies)}, tmp_path / "moe")
        sizes.append((tmp_path / "moe" / "mix.json").stat().st_size)
    assert sizes[2] - sizes[1] < 2.4 * (sizes[1] - sizes[0])  # 2 if it is linear, 4 if quadratic
