"""What an id means is known from any tokenizer's files; ids beyond the embedding are refused wherever they are used."""

from __future__ import annotations

import base64
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from btx.errors import CheckpointError
from btx.mixing.extend import extend
from btx.mixing.mix import mix
from btx.model_files.token_ids import read_vocabulary
from btx.model_files.vocabularies import check_ids, missing_packages, vocabulary_difference
from btx.models.loading import load_tokenizer
from btx.running.preflight import preflight
from tests.pico_models import tokenizer
from tests.pico_run import pico_recipe

Edit = Callable[[dict[str, Any]], None]
MakeLlama = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tokenizer as transformers saves it."""
    tokenizer().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit(file: Path, change: Edit) -> None:
    value = json.loads(file.read_text("utf-8"))
    change(value)
    file.write_text(json.dumps(value), "utf-8")


# The same vocabulary in other files


def as_gpt2(saved: Path, folder: Path) -> None:
    model = json.loads((saved / "tokenizer.json").read_text("utf-8"))["model"]
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", "utf-8")


def byte_tokens(saved: Path) -> list[bytes]:
    """The entries as bytes, in the order of their ids, without the special token, which is id 0."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelling = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = json.loads((saved / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    return [bytes(spelling[c] for c in token) for token in sorted(vocabulary, key=vocabulary.get)[1:]]


def as_tekken(saved: Path, folder: Path) -> None:
    entries = [{"rank": rank, "token_bytes": base64.b64encode(token).decode()}
               for rank, token in enumerate(byte_tokens(saved))]  # fmt: skip
    special = [{"rank": 0, "token_str": "<|endoftext|>"}]
    config = {"default_num_special_tokens": 1, "default_vocab_size": 320, "pattern": "x"}
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": entries, "special_tokens": special}))


def as_tiktoken(saved: Path, folder: Path) -> None:
    lines = [f"{base64.b64encode(token).decode()} {rank + 1}" for rank, token in enumerate(byte_tokens(saved))]
    (folder / "tokenizer.model").write_text("\n".join(lines))


def as_sentencepiece(saved: Path, folder: Path) -> None:
    vocabulary = json.loads((saved / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    pieces = [piece.encode() for piece in sorted(vocabulary, key=vocabulary.get)]
    (folder / "tokenizer.model").write_bytes(sentencepiece(pieces))


def sentencepiece(pieces: list[bytes], score: float = -1.0) -> bytes:
    """A SentencePiece model: field 1 of the message are pieces, with text, score and type; field 2 the trainer's."""
    made = b""
    for piece in pieces:
        message = b"\x0a" + bytes([len(piece)]) + piece + b"\x15" + struct.pack("<f", score) + b"\x18\x01"
        made += b"\x0a" + bytes([len(message)]) + message
    return made + b"\x12\x03\x0a\x01x"


FORMS = [as_gpt2, as_tekken, as_tiktoken, as_sentencepiece]


@pytest.mark.parametrize("form", FORMS)
def test_the_same_vocabulary_in_other_files_is_the_same_and_another_is_not(
    saved: Path, tmp_path: Path, form: Callable[[Path, Path], None]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    form(saved, other)
    assert vocabulary_difference(other, saved) is None
    assert vocabulary_difference(saved, other) is None
    vocabulary = json.loads((saved / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[300:302]

    def swap(value: dict[str, Any]) -> None:
        value["model"]["vocab"][one], value["model"]["vocab"][two] = 301, 300

    edit(saved / "tokenizer.json", swap)
    first = min(one, two)
    said = f"another vocabulary than the seed model's: {first!r} has id {vocabulary[first]}, there "
    assert said in str(vocabulary_difference(other, saved))
    for folder in (saved, other):
        assert vocabulary_difference(folder, folder) is None


@pytest.mark.parametrize(("change", "words"), [
    (lambda folder: (folder / "tokenizer.model").write_bytes(sentencepiece([b"a", b"c"])), "'b' has no entry, there"),
    (lambda folder: (folder / "tokenizer.model").write_bytes(sentencepiece([b"a", b"b"], -2.0)), "another scores than"),
    (lambda folder: (folder / "added_tokens.json").write_text('{"<x>": 2}'), "added_tokens.json: another vocabulary"),
    (lambda folder: (folder / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}'), "'[PAD]' has id 2"),
    (lambda folder: (folder / "tokenizer.model").unlink(), "no tokenizer"),
])  # fmt: skip
def test_tokenizers_without_json_are_compared_entry_by_entry(
    tmp_path: Path, change: Callable[[Path], Any], words: str
) -> None:
    for name in ("seed", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(sentencepiece([b"a", b"b"]))
    assert vocabulary_difference(tmp_path / "other", tmp_path / "seed") is None
    change(tmp_path / "other")
    assert words in str(vocabulary_difference(tmp_path / "other", tmp_path / "seed"))


@pytest.mark.parametrize("files", [
    {},
    {"tokenizer_config.json": {"pad_token": "[PAD]"}},
    {"tokenizer_config.json": {"pad_token": {"__type": "AddedToken", "content": "[P]"}, "extra_special_tokens": ["q"]}},
    {"tokenizer_config.json": {"additional_special_tokens": ["<q>", "<|endoftext|>"]}},
    {"tokenizer_config.json": {"added_tokens_decoder": {"400": {"content": "<x>"}, "9": {"content": "<y>"}}}},
    {"added_tokens.json": {"<b>": 321, "<a>": 320}, "special_tokens_map.json": {"pad_token": "[PAD]"}},
    {"added_tokens.json": {"<a>": 320}, "special_tokens_map.json": {"pad_token": "[PAD]"},
     "tokenizer_config.json": {"added_tokens_decoder": {"0": {"content": "<|endoftext|>"}}}},
])  # fmt: skip
@pytest.mark.parametrize("form", [None, as_gpt2])
def test_ids_are_those_that_transformers_gives(saved: Path, files: dict[str, Any], form: Any) -> None:
    if form is not None:
        form(saved, saved)
        (saved / "tokenizer.json").unlink()
        edit(saved / "tokenizer_config.json", lambda value: value.update(tokenizer_class="GPT2Tokenizer"))
    for name, more in files.items():
        if not (saved / name).exists():
            (saved / name).write_text("{}")
        edit(saved / name, lambda value, more=more: value.update(more))
    found = read_vocabulary(saved)
    assert found is not None
    assert found.ids == AutoTokenizer.from_pretrained(saved).get_vocab()


@pytest.mark.parametrize(("name", "content"), [
    ("tokenizer.json", b"{"), ("tokenizer.json", b"[]"), ("tokenizer.json", b"{}"),
    ("tokenizer.json", b'{"model": {"vocab": {"a": "b"}}}'), ("tokenizer.json", b"[" * 100_000),
    ("tokenizer.model", b"\x0b"), ("tokenizer.model", b"!! 1"), ("tokenizer.model", b"\x0a\xff"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": "a"}}'), ("tokenizer_config.json", b'{"pad_token": {}, '
     b'"extra_special_tokens": 5}'), ("added_tokens.json", b'{"a": "b"}'), ("special_tokens_map.json", b"[]"),
    ("tekken.json", b'{"vocab": []}'), ("vocab.json", b"[1]"), ("vocab.json", b'{"a": null}'), ("vocab.txt", b"\xff"),
])  # fmt: skip
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / name).write_bytes(content)
    if name == "vocab.txt":  # of which vocab.json takes the place
        (tmp_path / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match=rf"/{name}: not "):
        read_vocabulary(tmp_path)


# Ids beyond the embedding


def add_token(folder: Path) -> None:
    """What people do who add tokens and do not resize the embedding."""
    edit(folder / "tokenizer.json", lambda value: value["added_tokens"].append(
        value["added_tokens"][0] | {"id": 320, "content": "<|im_start|>"}))  # fmt: skip
    edit(folder / "tokenizer_config.json", lambda value: value.update(pad_token="[PAD]"))


BEYOND = (r"{}/tokenizer\.json: 2 tokens without a row in the embedding, which has 320 \(ids 0 to 319\): "
          r"'<\|im_start\|>' \(320\), '\[PAD\]' \(321\)")  # fmt: skip


def test_ids_beyond_the_embedding_are_refused_wherever_they_would_be_used(
    make_llama: MakeLlama, tmp_path: Path
) -> None:
    seed, chat, output = make_llama("seed"), make_llama("chat", 1), tmp_path / "moe"
    mix(seed, {"chat": chat}, output)
    for folder in (chat, output):
        add_token(folder)
    with pytest.raises(CheckpointError, match=BEYOND.format("chat")):
        mix(seed, {"chat": chat}, tmp_path / "moe2", tokenizer_from="chat")
    with pytest.raises(CheckpointError, match="seed model: .*" + BEYOND.format("chat")):
        mix(chat, {"a": seed, "b": seed}, tmp_path / "moe2")
    with pytest.raises(CheckpointError, match=BEYOND.format("moe")):
        extend(output, "more", seed, tmp_path / "moe2")
    with pytest.raises(CheckpointError, match=BEYOND.format("chat")):
        load_tokenizer(chat)  # what chat, evaluate, train and data go through
    with pytest.raises(CheckpointError, match=BEYOND.format("chat")):  # what run and plan do first
        preflight(pico_recipe(tmp_path, "run", f"seed_model={{path: {chat}}}"))
    assert not (tmp_path / "moe2").exists()
    mix(seed, {"chat": chat}, tmp_path / "moe2", tokenizer_from="seed")


def test_a_special_token_alone_can_be_beyond_and_its_file_is_named(saved: Path) -> None:
    check_ids(saved, 320)
    edit(saved / "tokenizer_config.json", lambda value: value.update(pad_token="[PAD]"))
    with pytest.raises(
        CheckpointError, match=r"saved/tokenizer_config\.json: 1 token without a row .*'\[PAD\]' \(320\)"
    ):
        check_ids(saved, 320)
    check_ids(saved, 321)


def test_what_makes_a_run_useless_is_refused_before_it_begins(
    make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btx.model_files.vocabularies._is_installed", lambda module: False)
    seed = make_llama("seed")
    from_seed = f"seed_model={{path: {seed}}}"
    preflight(pico_recipe(tmp_path, "run", from_seed))
    for chosen in ("nobody", str(tmp_path)):
        with pytest.raises(CheckpointError, match=f"mix.tokenizer_from: .*{chosen}"):
            preflight(pico_recipe(tmp_path, "run", from_seed, f"mix.tokenizer_from={chosen}"))
    (seed / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="seed: no tokenizer: text cannot become tokens"):
        preflight(pico_recipe(tmp_path, "run", from_seed))
    (seed / "tokenizer.model").write_bytes(sentencepiece([b"a", b"b"]))
    with pytest.raises(CheckpointError, match=r"seed/tokenizer\.model: .* sentencepiece and protobuf"):
        preflight(pico_recipe(tmp_path, "run", from_seed))


# Packages


@pytest.mark.parametrize(("name", "content", "packages"), [
    ("tokenizer.model", sentencepiece([b"a"]), "pip install sentencepiece protobuf"),
    ("tokenizer.model", b"IQ== 0\n", "pip install tiktoken"),
    ("tekken.json", b"{}", "pip install mistral-common"),
    ("vocab.json", b"{}", None),
])  # fmt: skip
def test_the_packages_that_help_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, packages: str | None
) -> None:
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("btx.model_files.vocabularies.find_spec", lambda module: None)
    assert (packages or "None") in str(missing_packages(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert missing_packages(tmp_path) is None


def test_a_mix_that_needs_no_tokenizer_copies_one_that_cannot_be_loaded(
    make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btx.model_files.vocabularies._is_installed", lambda module: False)
    seed, math = make_llama("seed"), make_llama("math", 1)
    for folder in (seed, math):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(sentencepiece([b"a", b"b"]))
    lines: list[str] = []
    mix(seed, {"math": math}, tmp_path / "moe", log=lines.append)
    assert [line for line in lines if "warning" in line and "sentencepiece and protobuf" in line and "unread" in line]
    assert (tmp_path / "moe" / "tokenizer.model").read_bytes() == (seed / "tokenizer.model").read_bytes()
    text = tmp_path / "text.txt"
    text.write_text("some text")
    with pytest.raises(CheckpointError, match="pip install sentencepiece protobuf"):
        mix(seed, {"math": math}, tmp_path / "moe2", router_init="ridge", texts={"math": text, "generalist": text})


# What travels with a tokenizer


def with_chat(folder: Path, eos: str | None = None, **ids: Any) -> Path:
    """A folder of a chat model: templates, and an end of its own."""
    made = AutoTokenizer.from_pretrained(folder)
    made.chat_template = {"default": "plain {{ messages }}", "tool_use": "tools {{ messages }}"}
    if eos is not None:
        made.eos_token = made.convert_ids_to_tokens(5)
    made.save_pretrained(folder)
    edit(folder / "config.json", lambda value: value.update(ids))
    return folder


def test_everything_a_tokenizer_needs_travels_with_it(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, math = with_chat(make_llama("seed")), make_llama("math", 1)
    extra = ["merges.txt", "qwen.tiktoken", "tokenizer.model.v3", "LICENSE", "added_tokens.json"]
    for name in extra:
        (seed / name).write_text("{}")
    for name in ("secret.txt", "README.md", "train.py"):
        (seed / name).write_text("not copied")
    mix(seed, {"math": math}, tmp_path / "moe", tokenizer_from="seed")
    copied = {str(file.relative_to(tmp_path / "moe")) for file in (tmp_path / "moe").rglob("*") if file.is_file()}
    assert copied >= {*extra, "chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    assert not copied & {"secret.txt", "train.py"}
    assert "not copied" not in (tmp_path / "moe" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "moe").chat_template == {
        "default": "plain {{ messages }}", "tool_use": "tools {{ messages }}"
    }  # fmt: skip


@pytest.mark.parametrize(("config", "generation", "expected"), [
    ({"eos_token_id": 5}, {"eos_token_id": [5, 0]}, (5, [5, 0])),
    ({"eos_token_id": 5}, None, (5, 5)),
    ({"eos_token_id": [7, 5]}, None, ([7, 5], [7, 5])),
    ({"eos_token_id": 0}, None, (5, [5, 0])),  # as its base model's, which the tokenizer has left
    ({"eos_token_id": 0}, {"eos_token_id": [0, 7]}, (5, [5, 0, 7])),
    ({"eos_token_id": None}, {"temperature": 2.0}, (5, 5)),
])  # fmt: skip
def test_ends_of_text_are_those_of_the_tokenizer_that_was_chosen(
    make_llama: MakeLlama, tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, expected: Any
) -> None:
    seed, chat = (
        make_llama("seed"),
        with_chat(make_llama("chat", 1), eos="own", bos_token_id=3, pad_token_id=6, **config),
    )
    (chat / "generation_config.json").unlink()
    if generation is not None:
        (chat / "generation_config.json").write_text(json.dumps(generation))
    (seed / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 9], "top_k": 7}))
    mix(seed, {"chat": chat}, tmp_path / "moe", tokenizer_from="chat")
    mixed = {
        name: json.loads((tmp_path / "moe" / f"{name}.json").read_text()) for name in ("config", "generation_config")
    }
    assert (mixed["config"]["eos_token_id"], mixed["generation_config"]["eos_token_id"]) == expected
    assert mixed["config"]["bos_token_id"] == mixed["generation_config"]["bos_token_id"] == 0  # the tokenizer's
    assert mixed["config"]["pad_token_id"] == 6  # the tokenizer's is its bos, whose embedding has to be trained
    assert mixed["generation_config"]["pad_token_id"] == 0
    assert mixed["generation_config"]["top_k"] == 7


@pytest.mark.parametrize(("name", "value"), [("config", "5"), ("generation_config", ["5"]), ("generation_config", {})])
def test_ids_that_are_none_are_refused(make_llama: MakeLlama, tmp_path: Path, name: str, value: Any) -> None:
    seed, chat = make_llama("seed"), make_llama("chat", 1)
    edit(chat / f"{name}.json", lambda said: said.update(eos_token_id=value))
    with pytest.raises(CheckpointError, match=rf"chat/{name}\.json: eos_token_id is .*: expected an id, a list"):
        mix(seed, {"a": seed}, tmp_path / "moe", tokenizer_from=str(chat))
    assert not (tmp_path / "moe").exists()


def test_a_tokenizer_without_a_model_keeps_the_ids_that_mean_the_same(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, alone = make_llama("seed", eos_token_id=[0, 8, 9]), tmp_path / "alone"
    alone.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(seed / name, alone)

    def swap(value: dict[str, Any]) -> None:
        vocabulary = value["model"]["vocab"]
        eight, ten = (next(token for token, number in vocabulary.items() if number == n) for n in (8, 10))
        vocabulary[eight], vocabulary[ten] = 10, 8

    edit(alone / "tokenizer.json", swap)
    mix(seed, {"a": seed}, tmp_path / "moe", tokenizer_from=str(alone))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "moe" / name).read_text())["eos_token_id"] == [0, 9]
