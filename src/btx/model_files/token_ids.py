"""Token → id of a model folder, from whatever files its tokenizer has. Plain Python: needs none of the packages that
would load the tokenizer.

tokenizer.json (tokenizers), *.model (SentencePiece, or tiktoken's text as Llama 3 has it), tekken.json (Mistral),
vocab.json with merges.txt (GPT-2), vocab.txt (BERT), *.tiktoken; then what is added by tokenizer_config.json,
added_tokens.json and special_tokens_map.json.
"""

from __future__ import annotations

import base64
import contextlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from btx.errors import CheckpointError
from btx.system_errors import blame

CONFIG = "tokenizer_config.json"
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")


@dataclass
class Vocabulary:
    """What the ids of a tokenizer mean."""

    kind: str
    """The kind of file: `tokenizer.json`, `sentencepiece`, ..."""
    file: Path
    """The file that holds it."""
    ids: dict[str, int]
    """Token → id, tokens added by other files included; bytes are written as GPT-2 does."""
    merges: list[tuple[str, ...]] | None = None
    """In order; None where the file has none."""
    rules: dict[str, Any] = field(default_factory=dict)
    """What else decides the ids of a text; comparable between files of a kind."""
    lists_special: bool = True
    """Whether the special tokens are in the files; else only code knows them."""
    added_by: dict[str, Path] = field(default_factory=dict)
    """Token → the file that adds it, where it is not `file`."""


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary in a folder, from the file that a tokenizer is loaded from; None if it holds no tokenizer."""
    for pattern, read in READERS:
        for file in sorted(folder.glob(pattern)):
            with _naming(file):
                if not (vocabulary := read(file)).ids:
                    raise ValueError("it has no entries")
            _add_tokens(vocabulary, folder)
            return vocabulary
    return None


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Say of whatever goes wrong inside that a file is none of its kind."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{file}: not a tokenizer's: {error!r}") from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CheckpointError if it holds something else."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        blame(error)
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return value


def is_sentencepiece(file: Path) -> bool:
    """Whether a .model file is SentencePiece's and not tiktoken's, which is text."""
    with open(file, "rb") as opened:
        return opened.read(1) == b"\n"


def _of_json(file: Path) -> Vocabulary:
    value = read_object(file)
    model = value["model"]
    vocabulary, scores = model["vocab"], None
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        scores = [float(entry[1]) for entry in vocabulary]
        vocabulary = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in value.get("added_tokens") or ()}
    listed = model.get("merges")
    merges = listed and [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in listed]
    rules = {key: model[key] or None for key in sorted(model.keys() - {"vocab", "merges"})}  # absent means false
    rules |= {part: value.get(part) for part in ("normalizer", "pre_tokenizer")} | {"scores": scores}
    return Vocabulary("tokenizer.json", file, _whole({**vocabulary, **added}), merges, rules)


def _of_model(file: Path) -> Vocabulary:
    if not is_sentencepiece(file):
        return _of_tiktoken(file)
    pieces = [dict(_fields(piece)) for number, piece in _fields(file.read_bytes()) if number == 1]
    normalizer = [value.hex() for number, value in _fields(file.read_bytes()) if number == 3]
    ids = {piece[1].decode("utf-8", "replace"): number for number, piece in enumerate(pieces)}
    scores = [struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0 for piece in pieces]
    return Vocabulary("sentencepiece", file, ids, rules={"scores": scores, "normalizer": normalizer})


def _of_tekken(file: Path) -> Vocabulary:
    value = read_object(file)
    config = value["config"]
    first, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
    entries = value["vocab"][: size - first]
    ids = {
        _spelt(base64.b64decode(entry["token_bytes"], validate=True)): first + int(entry["rank"]) for entry in entries
    }
    special = {str(entry["token_str"]): int(entry["rank"]) for entry in value.get("special_tokens") or ()}
    rules = {"pattern": config.get("pattern")}
    return Vocabulary("tekken", file, ids | special, rules=rules, lists_special=bool(special))


def _of_tiktoken(file: Path) -> Vocabulary:
    pairs = [line.split() for line in file.read_bytes().splitlines() if line.strip()]
    ids = {_spelt(base64.b64decode(pair[0], validate=True)): int(pair[1]) for pair in pairs}
    return Vocabulary("tiktoken", file, ids, lists_special=False)


def _of_vocab_json(file: Path) -> Vocabulary:
    merges = file.with_name("merges.txt")
    lines = merges.read_text("utf-8").split("\n") if merges.is_file() else []
    pairs = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    return Vocabulary("vocab.json", file, _whole(read_object(file)), pairs or None)


def _of_vocab_txt(file: Path) -> Vocabulary:
    lines = file.read_text("utf-8").split("\n")
    return Vocabulary("vocab.txt", file, {line.rstrip("\r"): number for number, line in enumerate(lines) if line})


READERS: tuple[tuple[str, Callable[[Path], Vocabulary]], ...] = (
    ("tokenizer.json", _of_json),
    ("tokenizer.model", _of_model),
    ("tekken.json", _of_tekken),
    ("vocab.json", _of_vocab_json),
    ("*.model", _of_model),
    ("vocab.txt", _of_vocab_txt),
    ("*.tiktoken", _of_tiktoken),
)
"""File → how it is read, in the order in which they are looked for."""


def _add_tokens(vocabulary: Vocabulary, folder: Path) -> None:
    """Add the tokens that other files add; transformers gives them the next ids, whatever ids they are said to have."""
    config, older, mapped = (folder / name for name in (CONFIG, "added_tokens.json", "special_tokens_map.json"))
    said = {file: read_object(file) for file in (config, older, mapped) if file.is_file()}
    added: list[tuple[str, Path]] = []
    with _naming(config):
        decoder = said.get(config, {}).get("added_tokens_decoder") or {}
        added += [(_content(decoder[number]), config) for number in sorted(decoder, key=int)]
    if added:  # the older files are read only without
        said.pop(older, None)
        said.pop(mapped, None)
    with _naming(older):
        tokens = said.pop(older, {})
        added += [(token, older) for token in sorted(tokens, key=lambda token: int(tokens[token]))]
    for file, value in said.items():
        with _naming(file):
            more = [token for key in MORE_SPECIAL for token in _listed(value.get(key))]
            added += [(_content(token), file) for token in (*(value.get(key) for key in SPECIAL), *more) if token]
    following = 1 + max(vocabulary.ids.values())
    for token, file in added:
        if token not in vocabulary.ids and vocabulary.lists_special:
            vocabulary.ids[token] = following
            vocabulary.added_by[token] = file
            following += 1


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _listed(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else list(tokens or ())


def _whole(ids: dict[str, Any]) -> dict[str, int]:
    """Ids that are numbers."""
    for token, number in ids.items():
        if not isinstance(number, int):
            raise TypeError(f"the id of {token!r} is {number!r}")
    return ids


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protobuf message: bytes where they have a length, integers as such."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError("not a SentencePiece model")
        size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _spelt(token: bytes) -> str:
    """Bytes as GPT-2 spells them: every byte a printable character."""
    return "".join(_SPELLING[byte] for byte in token)


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_SPELLING = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + number) for number, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}
