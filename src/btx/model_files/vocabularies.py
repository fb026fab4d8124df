"""Are the tokenizers of two model folders the same? Token ids must mean the same in all experts. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from btx.errors import CheckpointError
from btx.system_errors import blame

JSON_BESIDE_WEIGHTS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "generation_config.json",
)  # fmt: skip
# Files that hold a vocabulary, the most telling first.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")


def broken_json(folder: Path) -> list[str]:
    """What is wrong with the JSON files that are copied beside the weights."""
    problems = []
    for name in JSON_BESIDE_WEIGHTS:
        try:
            if (folder / name).is_file():
                _read(folder / name)
        except CheckpointError as error:
            problems.append(str(error))
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file() and not problems:
        try:
            Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the tokenizers library raises plain Exception
            blame(error)
            problems.append(f"{tokenizer}: no tokenizer: {error}")
    return problems


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder with a tokenizer that transformers cannot load; a folder without is fine.

    Raises:
        CheckpointError: with the folder's tokenizer files and what transformers says.
    """
    from transformers import AutoTokenizer

    files = [name for name in (*_VOCABULARIES, *JSON_BESIDE_WEIGHTS[1:4]) if (folder / name).is_file()]
    if not any(name in _VOCABULARIES for name in files):
        return
    try:
        AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # tokenizers fail with errors of many types
        blame(error)
        raise CheckpointError(f"{folder}: the tokenizer ({', '.join(files)}) cannot be loaded: {error}") from error


def vocabulary_difference(folder: Path, seed: Path) -> str | None:
    """How the tokenizer of `folder` differs from that of `seed`: file and first difference; None if it does not.

    Sizes alone prove nothing: entries, their ids, merges and added tokens are compared.

    Raises:
        CheckpointError: a tokenizer file that cannot be read.
    """
    own = [name for name in _VOCABULARIES if (folder / name).is_file()]
    theirs = [name for name in _VOCABULARIES if (seed / name).is_file()]
    both = [name for name in own if name in theirs]
    if not own:
        return "no tokenizer" if theirs else None
    if not theirs:
        return f"{folder / own[0]}: a tokenizer, which the seed model's folder lacks"
    if not both:
        return f"{folder / own[0]}: the seed model has its vocabulary in {theirs[0]}; they cannot be compared"
    if both[0] != "tokenizer.json":
        for name in both:
            if (folder / name).read_bytes() != (seed / name).read_bytes():
                return f"{folder / name}: another vocabulary than the seed model's"
        return None
    return _json_difference(folder / "tokenizer.json", _read(folder / "tokenizer.json"), _read(seed / "tokenizer.json"))


def _json_difference(file: Path, own: dict[str, Any], seed: dict[str, Any]) -> str | None:
    """The first difference of two tokenizer.json."""
    ids, seed_ids = _ids(own), _ids(seed)
    for token in sorted(ids.keys() | seed_ids.keys()):
        if ids.get(token) != seed_ids.get(token):
            what = [f"id {x[token]}" if token in x else "no entry" for x in (ids, seed_ids)]
            return f"{file}: another vocabulary than the seed model's: {token!r} has {what[0]}, there {what[1]}"
    merges = [[tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in x["model"].get("merges") or ()]
              for x in (own, seed)]  # fmt: skip
    if merges[0] != merges[1]:
        return f"{file}: other merges than the seed model's"
    for part in ("normalizer", "pre_tokenizer"):
        if own.get(part) != seed.get(part):
            return f"{file}: another {part} than the seed model's"
    for key in sorted((own["model"].keys() | seed["model"].keys()) - {"vocab", "merges"}):
        value, seed_value = own["model"].get(key) or None, seed["model"].get(key) or None  # absent means false
        if value != seed_value:
            return f"{file}: {key} is {value!r}, the seed model's tokenizer has {seed_value!r}"
    return None


def _ids(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Token → id, added tokens included."""
    try:
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            vocabulary = {str(entry[0]): (number, entry[1]) for number, entry in enumerate(vocabulary)}
        return {**vocabulary, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}}
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"tokenizer.json: not a tokenizer: {error!r}") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        blame(error)
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return value
