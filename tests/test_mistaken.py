"""What people give for a model by mistake is told by name, with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from btx.errors import CheckpointError
from btx.model_files.model_folder import check_model_folder

CONFIG = json.dumps({"model_type": "llama"})
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 184504\n"
COMPOSITE = json.dumps({"model_type": "mistral3", "text_config": {"model_type": "mistral"}, "vision_config": {}})
CASES: list[tuple[dict[str, str], list[str]]] = [
    ({"adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "org/base"}'},
     ["an adapter (LORA, adapter_config.json) of org/base", "merge_and_unload"]),
    ({"adapter_config.json": "[]"}, ["an adapter (PEFT", "a model it does not name"]),
    ({"adapter_config.json": "{}", "config.json": CONFIG, "model.safetensors": "x"}, ["a model and an adapter"]),
    ({"config.json": CONFIG, "model.safetensors": POINTER}, ["model.safetensors is a Git LFS pointer", "git lfs pull"]),
    ({"config.json": CONFIG, "model.safetensors": "x", "tokenizer.json": POINTER}, ["tokenizer.json is a Git LFS"]),
    ({"config.json": COMPOSITE, "model.safetensors": "x"},
     ["config.json: mistral3 is a multimodal model (text_config, vision_config)", "save its text model first"]),
    ({"blobs/0": "x", "refs/main": "b", "snapshots/a/config.json": CONFIG, "snapshots/b/config.json": CONFIG},
     ["a Hugging Face cache entry; give the model's own folder: {folder}/snapshots/b, {folder}/snapshots/a"]),
    ({"models--org--x/snapshots/a/config.json": CONFIG}, ["{folder}/models--org--x/snapshots/a"]),
    ({"snapshots/a/readme": "x"}, ["a Hugging Face cache entry without a model", "not complete"]),
    ({"checkpoint-10/config.json": CONFIG, "checkpoint-20/config.json": CONFIG},
     ["there are some below; give the model's own folder: {folder}/checkpoint-10, {folder}/checkpoint-20"]),
    ({"recipe.yaml": "", "mix/model/config.json": CONFIG}, ["{folder}/mix/model"]),
    ({"model.Q4_K_M.gguf": "GGUF"}, ["GGUF files, which llama.cpp reads", "give the model it was made from"]),
    ({"config.json": CONFIG, "pytorch_model.bin": "x"}, ["only pickled weights (.bin)", "save_pretrained"]),
    ({"config.json": CONFIG, "consolidated.00.pth": "x"}, ["only pickled weights (.pth)"]),
    ({"config.json": CONFIG, "training_args.bin": "x"}, ["there is no .safetensors file"]),
    ({"params.json": "{}", "consolidated.safetensors": "x"}, ["a model in its maker's own format (params.json)"]),
    ({"model_index.json": "{}"}, ["a diffusion pipeline"]),
    ({"model.zip": "x"}, ["an archive (model.zip); unpack it"]),
    ({"config.json": "[" * 100_000, "model.safetensors": "x"}, ["config.json: not readable as JSON"]),
    ({"readme": "x"}, ["this folder holds no model: config.json is missing"]),
]  # fmt: skip


@pytest.mark.parametrize(("files", "words"), CASES)
def test_a_folder_that_is_no_model_is_told_what_it_is(tmp_path: Path, files: dict[str, str], words: list[str]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        check_model_folder(tmp_path)
    for word in words:
        assert word.format(folder=tmp_path) in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(("name", "start", "words"), [
    ("model.gguf", b"GGUF\x03\0\0\0", "a GGUF file"),
    ("model.zip", b"PK\x03\x04", "an archive; unpack it"),
    ("model.tar.gz", b"\x1f\x8b\x08", "an archive; unpack it"),
    ("model.safetensors", b"\0", "as save_pretrained writes it; give {folder}"),
    ("notes.txt", b"", "as save_pretrained writes it; this is a file"),
])  # fmt: skip
def test_a_file_is_told_what_it_is(tmp_path: Path, name: str, start: bytes, words: str) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    (tmp_path / name).write_bytes(start)
    with pytest.raises(CheckpointError, match=name) as caught:
        check_model_folder(tmp_path / name)
    assert words.format(folder=tmp_path) in str(caught.value)


def test_links_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"link: there is no such folder \(a link to gone\)"):
        check_model_folder(tmp_path / "link")
    (tmp_path / "config.json").write_text(CONFIG)
    (tmp_path / "model.safetensors").symlink_to("../../blobs/abc")
    with pytest.raises(CheckpointError, match=r"a link to \.\./\.\./blobs/abc, where nothing is; download the model"):
        check_model_folder(tmp_path)


def test_a_model_passes_whatever_else_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    for name in ("model.safetensors", "training_args.bin", "optimizer.pt", "model.gguf", "logo.png"):
        (tmp_path / name).write_text(POINTER if name == "logo.png" else "x")
    (tmp_path / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    (tmp_path / "checkpoint-1").mkdir()
    assert check_model_folder(tmp_path) == {"model_type": "llama"}
