"""What `mix` refuses: all problems in one message, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from btx.errors import CheckpointError, RunFolderError, UserError
from btx.mixing.mix import mix

MakeLlama = Callable[..., Path]
GATE = "model.layers.1.mlp.gate_proj.weight"


class Disk(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


def refusal(seed: Path, experts: dict[str, Path], output: Path, **options: Any) -> str:
    """The message with which mixing is refused; nothing may have been written."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(UserError) as caught:
        mix(seed, experts, output, **options)
    assert sorted(output.parent.iterdir()) == before
    assert caught.value.exit_code == 2
    return str(caught.value)


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("config", "words"), [
    ({"hidden_size": 64}, ["hidden_size is 64, the seed model has 32", "model.embed_tokens.weight is (320, 64)"]),
    ({"intermediate_size": 40}, ["intermediate_size is 40", "down_proj.weight is (32, 40), the seed model has (32,"]),
    ({"num_hidden_layers": 3}, ["num_hidden_layers is 3", "9 tensors: model.layers.2."]),
    ({"num_hidden_layers": 1}, ["num_hidden_layers is 1", "lacks 9 tensors: model.layers.1."]),
    ({"num_attention_heads": 8}, ["num_attention_heads is 8", "head_dim is 4"]),
    ({"num_key_value_heads": 4}, ["num_key_value_heads is 4", "self_attn.k_proj.weight is (32, 32)"]),
    ({"vocab_size": 330}, ["vocab_size is 330", "lm_head.weight is (330, 32)"]),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, ["rope_parameters is", "500000.0"]),
    ({"rms_norm_eps": 1e-3}, ["rms_norm_eps is 0.001, the seed model has 1e-06"]),
    ({"hidden_act": "gelu"}, ["hidden_act is 'gelu', the seed model has 'silu'"]),
    ({"tie_word_embeddings": True}, ["tie_word_embeddings is True", "lacks 1 tensor: lm_head.weight"]),
    ({"attention_bias": True}, ["attention_bias is True", "has 8 tensors: model.layers.0.self_attn.k_proj.bias"]),
    ({"max_position_embeddings": 64}, ["max_position_embeddings is 64"]),
])  # fmt: skip
def test_an_expert_of_another_shape_is_refused_with_name_file_and_tensor(
    make_llama: MakeLlama, tmp_path: Path, config: dict[str, Any], words: list[str]
) -> None:
    seed, good, bad = make_llama("seed"), make_llama("good", 1), make_llama("bad", 2, **config)
    message = refusal(seed, {"good": good, "bad": bad}, tmp_path / "moe")
    assert "expert good" not in message
    for word in words:
        assert any(word in line for line in message.splitlines() if f"expert bad: {bad}" in line), (word, message)


def test_every_problem_of_every_model_is_in_one_message(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, wide = make_llama("seed"), make_llama("wide", intermediate_size=40)
    absent, pickled = tmp_path / "no", tmp_path / "p"
    pickled.mkdir()
    shutil.copy(seed / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"never read")
    experts = {"wide": wide, "absent": absent, "pickled": pickled, "a/b": seed, "generalist": seed}
    message = refusal(seed, experts, tmp_path / "moe")
    for words in (
        "intermediate_size is 40", "no such folder", "only pickled weights (.bin)", "save_pretrained",
        "expert 'a/b': a name is", "expert generalist: an expert cannot be called so",
    ):  # fmt: skip
        assert words in message


@pytest.mark.parametrize(("edit", "words"), [
    (lambda tensors: tensors.pop(GATE), f"model.safetensors: lacks 1 tensor: {GATE}"),
    (lambda tensors: tensors.update(extra=torch.ones(2)), "model.safetensors: has 1 tensor: extra"),
    (lambda tensors: tensors.update({GATE: torch.ones(48, 31)}), f"model.safetensors: {GATE} is (48, 31)"),
    (lambda tensors: tensors.update({GATE: torch.ones(48, 32).int()}), f"{GATE} is of type I32; weights have to be"),
])  # fmt: skip
@pytest.mark.parametrize("whose", ["seed", "math"])
def test_tensors_that_do_not_fit_the_class_are_refused(
    make_llama: MakeLlama, tmp_path: Path, edit: Callable[..., Any], words: str, whose: str
) -> None:
    folders = {name: make_llama(name, number) for number, name in enumerate(("seed", "math", "code"))}
    edit_tensors(folders[whose], edit)
    message = refusal(folders["seed"], {name: folders[name] for name in ("math", "code")}, tmp_path / "moe")
    assert words in message
    assert f"{'seed model' if whose == 'seed' else 'expert math'}: {folders[whose]}" in message


def test_a_broken_expert_is_still_compared_with_the_seed_model(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, math = make_llama("seed"), make_llama("math", 1, hidden_act="gelu")
    edit_tensors(math, lambda tensors: tensors.pop(GATE))
    message = refusal(seed, {"math": math, "code": seed}, tmp_path / "moe")
    assert f"lacks 1 tensor: {GATE}" in message
    assert "hidden_act is 'gelu', the seed model has 'silu'" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [GATE, "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_anywhere_discard_the_output(
    make_llama: MakeLlama, tmp_path: Path, value: float, name: str, dtype: torch.dtype
) -> None:
    seed, bad = make_llama("seed"), make_llama("bad", 1)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})
        tensors[name].view(-1)[-1] = value

    edit_tensors(bad, spoil)
    message = refusal(seed, {"bad": bad}, tmp_path / "moe")
    assert message.startswith(f"expert bad: {bad}/model.safetensors: tensor {name} holds NaN or infinity")


def test_a_vocabulary_of_the_same_size_but_other_entries_is_refused_unless_one_is_chosen(
    make_llama: MakeLlama, tmp_path: Path
) -> None:
    seed, other = make_llama("seed"), make_llama("other", 1)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = sorted(vocabulary)[10:12]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(tokenizer))
    message = refusal(seed, {"other": other}, tmp_path / "moe")
    assert f"expert other: {file}: another vocabulary than the seed model's: {one!r} has id" in message
    assert "--tokenizer-from other or seed" in message
    for chosen, folder in (("other", other), ("seed", seed), (str(other), other)):
        mix(seed, {"other": other}, tmp_path / "moe", tokenizer_from=chosen)
        assert (tmp_path / "moe" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert "name an expert (other), `seed` or a folder" in refusal(
        seed, {"other": other}, tmp_path / "moe2", tokenizer_from="nobody"
    )


def test_what_is_odd_but_harmless_is_only_warned_of(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, math = make_llama("seed"), make_llama("math", 1)
    edit_json(math / "config.json", eos_token_id=5, use_cache=False, architectures=["Other"], unknown_key=3)
    bare = Path(shutil.copytree(math, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    lines: list[str] = []
    mix(seed, {"math": math, "again": math, "bare": bare, "copy": seed}, tmp_path / "moe", log=lines.append)
    warnings = [line.removeprefix("mix: warning: ") for line in lines if "warning" in line]
    assert warnings == [
        f"expert bare: {bare}: no tokenizer; taken to be the seed model's",
        f"the seed model and expert copy are the same folder: {seed}",
        f"expert math and expert again are the same folder: {math}",
    ]
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["eos_token_id"] == 0


def test_settings_that_cannot_work_are_refused(
    make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = make_llama("seed")
    output = tmp_path / "moe"
    assert "a mixture needs two" in refusal(seed, {"a": seed}, output, generalist=False)
    assert "a mixture needs two" in refusal(seed, {}, output)
    assert "top_k is 3, but there are 2 experts" in refusal(seed, {"a": seed}, output, top_k=3)
    assert "allowed are float32, bfloat16, float16" in refusal(seed, {"a": seed}, output, dtype="int8")
    assert "'5 pounds' is not a size" in refusal(seed, {"a": seed}, output, max_shard_size="5 pounds")
    monkeypatch.setattr("btx.model_files.shard_writer.shutil.disk_usage", lambda path: Disk(10**9, 10**9, 10**6))
    assert "needs 0.00 GB, but" in refusal(seed, {"a": seed}, output)
    with pytest.raises(RunFolderError):
        mix(seed, {"a": seed}, output)


def test_values_too_large_for_float16_discard_the_output(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed = make_llama("seed")
    edit_tensors(seed, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    assert "model.norm.weight: a value is too large for float16" in refusal(
        seed, {"a": seed}, tmp_path / "moe", dtype="float16"
    )


@pytest.mark.parametrize(("config", "words"), [
    ({"model_type": "gpt2"}, "config.json: model_type 'gpt2' cannot be mixed (an FF without a gate"),
    ({"model_type": "nonsense"}, "config.json: this is no model"),
    ({"mlp_bias": True}, "llama cannot become mixtral: mlp_bias: no MoE class has biases in its experts; "),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: give the unquantised model"),
])  # fmt: skip
def test_families_without_a_moe_class_are_refused(
    make_llama: MakeLlama, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    seed, math = make_llama("seed"), make_llama("math", 1)
    edit_json(seed / "config.json", **config)
    message = refusal(seed, {"math": math}, tmp_path / "moe")
    assert words in message
    if "quantization_config" not in config and config.get("model_type") != "nonsense":
        assert "families: cohere2, ernie4_5" in message


def test_an_unreadable_expert_of_a_family_of_its_own_is_named(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, math = make_llama("seed"), make_llama("math", 1)
    edit_json(math / "config.json", model_type="mistral", architectures=["MistralForCausalLM"])
    with pytest.raises(CheckpointError, match=r"expert math: .*: model_type is 'mistral', the seed model has 'llama'"):
        mix(seed, {"math": math}, tmp_path / "moe")
