"""Tokenizer and token files: exact layout, whole or absent, every kind of damage noticed."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from btx.data import sources, token_files
from btx.data import tokenizer as tokenizer_module
from btx.data.token_files import DocumentEncoder, TokenFile, token_file_writer
from btx.data.tokenizer import as_loaded_beside, fast_tokenizer, tokenizer_sha256, train_tokenizer
from btx.errors import CheckpointError, DataError
from tests.pico_models import write_token_file

WORDS = ["".join(random.Random(n).choices("aeioukmnprst", k=6)) for n in range(100)]
TEXTS = [f"The {n}th {WORDS[n % 100]} isn't {n * n} {WORDS[n % 7]}: naïve 日本\n\n\tx  y" for n in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """400 entries, `<|endoftext|>` as bos and eos."""
    return train_tokenizer(TEXTS, 400)


def with_special_tokens(tokenizer: PreTrainedTokenizerFast, **tokens: str | None) -> PreTrainedTokenizerFast:
    """The same vocabulary with other bos and eos tokens."""
    return PreTrainedTokenizerFast(tokenizer_object=fast_tokenizer(tokenizer), **tokens)


def documents_of(file: TokenFile) -> list[list[int]]:
    """The token ids of each document."""
    return [part.tolist() for part in np.split(file.tokens, file.document_starts[1:-1])]


def test_training_depends_on_the_texts_but_not_on_their_order(tokenizer: PreTrainedTokenizerFast) -> None:
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    assert tokenizer_sha256(train_tokenizer(shuffled, 400)) == tokenizer_sha256(tokenizer)
    assert tokenizer_sha256(train_tokenizer(TEXTS[:50], 400)) != tokenizer_sha256(tokenizer)


def test_the_vocabulary_has_the_asked_size_and_digits_stand_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 400
    assert tokenizer.tokenize("12 345") == ["1", "2", "Ġ", "3", "4", "5"]
    assert not [
        entry for entry in tokenizer.get_vocab() if len(entry) > 1 and any(c.isascii() and c.isdigit() for c in entry)
    ]
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ends == (0, 0, 0)
    assert tokenizer.model_max_length == 1_000_000


def test_no_text_trains_no_tokenizer() -> None:
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], 400)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_every_text_decodes_to_itself(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_saved_tokenizer_is_loaded_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_sha256(loaded) == tokenizer_sha256(tokenizer)
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert loaded.clean_up_tokenization_spaces is False


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_beside_a_model_the_tokenizer_stays_what_it_was_when_the_data_were_made(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, model_type: str
) -> None:
    settled = as_loaded_beside(tokenizer, model_type)
    settled.save_pretrained(tmp_path)
    alone = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    beside = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, "don't  !!\n\n  x 123"]
    expected = settled(texts)["input_ids"]
    assert alone(texts)["input_ids"] == beside(texts)["input_ids"] == expected
    assert len({tokenizer_sha256(t) for t in (settled, alone, beside)}) == 1


def test_truncation_and_padding_of_a_tokenizer_do_not_reach_the_data(tokenizer: PreTrainedTokenizerFast) -> None:
    cutting = with_special_tokens(tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    cutting.backend_tokenizer.enable_truncation(2)
    cutting.backend_tokenizer.enable_padding(length=50)
    assert DocumentEncoder(cutting)(TEXTS) == DocumentEncoder(tokenizer)(TEXTS)
    assert tokenizer_sha256(cutting) == tokenizer_sha256(tokenizer)
    assert cutting.backend_tokenizer.truncation is not None


def test_a_token_file_holds_every_document_behind_its_separator(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = write_token_file(tmp_path / "f", iter(TEXTS), tokenizer, rng_seed=7, source={"path": "x"})
    documents = documents_of(file)
    assert [document[0] for document in documents] == [0] * len(TEXTS)
    assert [tokenizer.decode(document[1:]) for document in documents] == TEXTS
    assert file.document_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    tokens = (tmp_path / "f" / "tokens.bin").read_bytes()
    assert json.loads((tmp_path / "f" / "index.json").read_text()) == {
        "tokens": len(tokens) // 2, "bytes": sum(len(text.encode()) for text in TEXTS), "documents": len(TEXTS),
        "dtype": "uint16", "trailing_eos": False, "sha256": hashlib.sha256(tokens).hexdigest(),
        "tokenizer_sha256": tokenizer_sha256(tokenizer), "rng_seed": 7, "source": {"path": "x"},
    }  # fmt: skip
    assert len(file) == file.document_starts[-1] == len(file.tokens)


SEPARATORS = [
    ({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, [0], []),
    ({"bos_token": None, "eos_token": "!"}, ["!"], []),
    ({"bos_token": "<|endoftext|>", "eos_token": None}, [0], []),
    ({"bos_token": "<|endoftext|>", "eos_token": "!"}, [0], ["!"]),
]


@pytest.mark.parametrize(("special", "head", "tail"), SEPARATORS)
def test_the_separator_is_bos_or_eos_and_an_eos_follows_only_if_it_differs(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, special: dict[str, Any], head: list[Any], tail: list[Any]
) -> None:
    other = with_special_tokens(tokenizer, **special)
    head, tail = ([other.convert_tokens_to_ids(t) if t else 0 for t in part] for part in (head, tail))
    file = write_token_file(tmp_path / "f", TEXTS, other, rng_seed=0, source={})
    plain = other(TEXTS, add_special_tokens=False)["input_ids"]
    assert documents_of(file) == [head + ids + tail for ids in plain]
    assert file.trailing_eos == bool(tail)


def test_a_tokenizer_that_cannot_separate_documents_or_is_not_fast_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(CheckpointError, match="neither a bos nor an eos"):
        DocumentEncoder(with_special_tokens(tokenizer))
    from transformers import ByT5Tokenizer

    with pytest.raises(CheckpointError, match="needs a fast tokenizer"):
        DocumentEncoder(ByT5Tokenizer())


def test_large_vocabularies_take_four_bytes_a_token(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(65_537)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    large = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w65535")
    file = write_token_file(tmp_path / "f", ["w1 w65536"], large, rng_seed=0, source={})
    assert (file.tokens.dtype, file.tokens.tolist()) == (np.dtype("<u4"), [65_535, 1, 65_536])


def test_many_batches_are_written_in_order(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_token_file(tmp_path / "whole", TEXTS, tokenizer, rng_seed=0, source={})
    monkeypatch.setattr("btx.data.token_files.BATCH_CHARACTERS", 100)
    parts = write_token_file(tmp_path / "parts", TEXTS, tokenizer, rng_seed=0, source={})
    assert parts.index == whole.index
    np.testing.assert_array_equal(parts.document_starts, whole.document_starts)


def test_no_documents_make_an_empty_token_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_token_file(tmp_path / "f", [], tokenizer, rng_seed=0, source={})
    assert (len(file), file.documents, file.bytes, file.tokens.size) == (0, 0, 0, 0)
    assert (file.document_starts.tolist(), file.document_bytes.tolist()) == ([0], [])


def test_an_interrupted_writer_leaves_what_was_there(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    encoder = DocumentEncoder(tokenizer)

    def interrupted(texts: list[str]) -> None:
        with token_file_writer(tmp_path / "f", encoder, rng_seed=0, source={}) as writer:
            for text in texts:
                writer.add(text)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(TEXTS)
    assert list(tmp_path.iterdir()) == []
    before = write_token_file(tmp_path / "f", TEXTS, tokenizer, rng_seed=0, source={}).index
    with pytest.raises(KeyboardInterrupt):
        interrupted(TEXTS[:5])
    assert TokenFile.open(tmp_path / "f").index == before
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    write_token_file(tmp_path / "f", TEXTS[:5], tokenizer, rng_seed=0, source={})
    assert TokenFile.open(tmp_path / "f").documents == 5


@pytest.mark.parametrize("name", ["index.json", "tokens.bin", "documents.npy", "bytes.npy"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "garbage"])
def test_missing_cut_off_and_foreign_files_are_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, damage: str
) -> None:
    write_token_file(tmp_path / "f", TEXTS, tokenizer, rng_seed=0, source={})
    path = tmp_path / "f" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut": content[:-8], "empty": b"", "garbage": b'{"tokens": 1}'}[damage])
    with pytest.raises(DataError) as caught:
        TokenFile.open(tmp_path / "f")
    assert str(path) in str(caught.value)
    assert "prepare the data" in str(caught.value)


def test_offsets_of_another_token_file_are_noticed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_token_file(tmp_path / "f", TEXTS, tokenizer, rng_seed=0, source={})
    write_token_file(tmp_path / "g", TEXTS[:9], tokenizer, rng_seed=0, source={})
    for name in ("documents.npy", "bytes.npy"):
        kept = (tmp_path / "f" / name).read_bytes()
        (tmp_path / "f" / name).write_bytes((tmp_path / "g" / name).read_bytes())
        with pytest.raises(DataError, match=f"{name}: .* does not fit the index"):
            TokenFile.open(tmp_path / "f")
        (tmp_path / "f" / name).write_bytes(kept)


# Long documents and long words


def with_words_of(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers that split text into words in their own ways."""
    bpe = Tokenizer(models.BPE(unk_token=None))
    if kind == "groups of digits":  # as Llama 3's
        pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        split = pre_tokenizers.Split(pattern, "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    elif kind == "metaspace":  # as Mistral's
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:  # as Llama 2's: a text is one word
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<s>", "<unk>", *map(chr, range(32, 127))]
    alphabet = special[2:]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special[:2], initial_alphabet=alphabet)
    trainer.show_progress = False
    bpe.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")


@pytest.mark.parametrize("kind", ["btx", "groups of digits", "metaspace", "none"])
def test_a_long_document_in_parts_has_the_tokens_of_the_whole(
    kind: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files, "PART_CHARACTERS", 400)
    monkeypatch.setattr(token_files, "WINDOW", 60)
    encoder = DocumentEncoder(tokenizer if kind == "btx" else with_words_of(kind))
    rng = random.Random(kind)
    words = [*" ".join(TEXTS).split(), "1234567", "<s>", "\n\n", "   ", "é", "日本語", "x" * 90, "7" * 130, "'s", "..."]
    parts = []
    for _ in range(30):
        text = "".join(rng.choice(words) + rng.choice(["", " ", " ", "\n", "  "]) for _ in range(400))
        found = list(encoder.in_parts(text))
        parts.append(len(found))
        assert [token for part in found for token in part] == encoder([text])[0]
    assert min(parts) > 3 or kind in ("metaspace", "none")
    (one_word,) = encoder(["y" * 3000])
    assert [token for part in encoder.in_parts("y" * 3000) for token in part] == one_word


def test_a_long_document_is_written_as_a_short_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["first", " ".join(TEXTS) * 4 + "\u3000\n ", "last"]
    whole = write_token_file(tmp_path / "a", texts, tokenizer, rng_seed=0, source={})
    monkeypatch.setattr(token_files, "LONG_DOCUMENT", 1000)
    monkeypatch.setattr(token_files, "PART_CHARACTERS", 500)
    monkeypatch.setattr(token_files, "WINDOW", 60)
    monkeypatch.setattr(sources, "LONG_TEXT", 100)
    parts = write_token_file(tmp_path / "b", texts, tokenizer, rng_seed=0, source={})
    assert parts.index == whole.index
    for name in ("document_starts", "document_bytes", "digests"):
        assert np.array_equal(getattr(parts, name), getattr(whole, name))


def test_long_words_train_a_tokenizer_in_slices_and_ordinary_text_the_same_one_as_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ordinary = [" ".join(TEXTS[i % len(TEXTS)] for i in range(k, k + 30)) + "\n\tcan't 12.5%" for k in range(20)]
    whole = train_tokenizer(ordinary, 400)
    with monkeypatch.context() as patched:
        patched.setattr(tokenizer_module, "LONGEST_TEXT", 50)
        assert tokenizer_sha256(train_tokenizer(ordinary, 400)) == tokenizer_sha256(whole)
    longest = tokenizer_module.LONGEST_WORD
    for letter in ("x", "+", " "):  # a word of each kind; whole, each would take minutes
        slices = train_tokenizer([letter * 1_000_000 + "a"], 300)
        same = train_tokenizer([*[letter * longest] * 499, letter * longest + "a"], 300)
        assert tokenizer_sha256(slices) == tokenizer_sha256(same)
