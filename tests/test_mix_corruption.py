"""Corrupted folders: every corruption is harmless, or refused with a message that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from btx.data.tokenizer import train_tokenizer
from btx.errors import CheckpointError, UserError
from btx.mixing.mix import mix
from tests.conftest import pico_texts

MakeLlama = Callable[..., Path]
INDEX = "model.safetensors.index.json"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", INDEX,
         "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")  # fmt: skip


@pytest.fixture
def folders(make_llama: MakeLlama, tmp_path: Path) -> dict[str, Path]:
    """A seed model and an expert, each in two shards."""
    made = {name: make_llama(name, number) for number, name in enumerate(("seed", "math"))}
    for folder in made.values():
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
        (folder / "model.safetensors").unlink()
        assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    return made


def truncate(content: bytes, at: float, value: int) -> bytes:
    return content[: int(at * len(content))]


def flip(content: bytes, at: float, value: int) -> bytes:
    place = int(at * (len(content) - 1))
    return content[:place] + bytes([content[place] ^ (value or 1)]) + content[place + 1 :]


def insert(content: bytes, at: float, value: int) -> bytes:
    place = int(at * len(content))
    return content[:place] + bytes([value]) + content[place:]


def zero(content: bytes, at: float, value: int) -> bytes:
    return content[: int(at * len(content))] + bytes(len(content) - int(at * len(content)))


def saturate(content: bytes, at: float, value: int) -> bytes:
    """NaN somewhere in the weights, or 0xff in a text."""
    place = int(at * len(content)) // 8 * 8
    return content[:place] + b"\xff" * len(content[place : place + 8]) + content[place + 8 :]


def empty(content: bytes, at: float, value: int) -> bytes:
    return b""


CHANGES = (truncate, flip, insert, zero, saturate, empty)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    whose=st.sampled_from(["seed", "math"]),
    name=st.sampled_from(FILES),
    change=st.sampled_from(CHANGES),
    at=st.floats(0, 1) | st.floats(0, 0.02),  # a file's first bytes are the most delicate
    value=st.integers(0, 255),
)
def test_a_corrupted_file_is_harmless_or_refused_by_name(
    folders: dict[str, Path], whose: str, name: str, change: Callable[..., bytes], at: float, value: int
) -> None:
    file = folders[whose] / name
    content = file.read_bytes()
    file.write_bytes(change(content, at, value))
    try:
        check(folders, file)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("whose", ["seed", "math"])
def test_a_missing_file_is_harmless_or_refused_by_name(folders: dict[str, Path], whose: str, name: str) -> None:
    (folders[whose] / name).unlink()
    check(folders, folders[whose] / name)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    whose=st.sampled_from(["seed", "math"]),
    name=st.sampled_from(["config.json", "generation_config.json", "tokenizer_config.json", INDEX]),
    data=st.data(),
)
def test_a_changed_json_value_is_harmless_or_refused_by_name(
    folders: dict[str, Path], whose: str, name: str, data: st.DataObject
) -> None:
    file = folders[whose] / name
    content = file.read_bytes()
    value = json.loads(content)
    inside = value["weight_map"] if name == INDEX else value
    key = data.draw(st.sampled_from(sorted(inside)))
    new: Any = data.draw(st.sampled_from([None, 0, -1, 7, 1e9, "x", [], {}, True, "../elsewhere"]))
    if data.draw(st.booleans()):
        inside[key] = new
    else:
        del inside[key]
    file.write_text(json.dumps(value))
    try:
        check(folders, file)
    finally:
        file.write_bytes(content)


def check(folders: dict[str, Path], file: Path) -> None:
    """Mixing ends with a model that transformers loads whole, or with a refusal that names the file."""
    output = folders["seed"].parent / "moe"
    shutil.rmtree(output, ignore_errors=True)
    refused = None
    try:
        mix(folders["seed"], {"math": folders["math"]}, output)
    except UserError as error:
        refused = str(error)
    if refused is not None:
        assert not output.exists()
        assert file.name in refused
        assert str(file.parent) in refused
        return
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert model(torch.arange(9)[None]).logits.shape == (1, 9, 320)
    if file.name != "tokenizer.json" or file.exists():
        AutoTokenizer.from_pretrained(output)


@pytest.mark.parametrize(("file", "expected"), [
    ("config.json", r"hidden_size|model\.embed_tokens|config\.json"),
    ("model.safetensors", r"model\.safetensors|config\.json asks for"),
    ("tokenizer.json", r"tokenizer\.json"),
])  # fmt: skip
@pytest.mark.parametrize("victim", ["seed", "a"])
def test_a_file_of_another_model_is_refused_by_name(
    make_llama: MakeLlama, tmp_path: Path, victim: str, file: str, expected: str
) -> None:
    folders = {name: make_llama(name, number) for number, name in enumerate(("seed", "a"))}
    other = make_llama("other", 2, hidden_size=64, vocab_size=352)
    train_tokenizer(pico_texts(), 300).save_pretrained(other)
    shutil.copyfile(other / file, folders[victim] / file)
    with pytest.raises(CheckpointError, match=expected):
        mix(folders["seed"], {"a": folders["a"]}, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()
