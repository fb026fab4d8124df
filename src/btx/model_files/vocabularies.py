"""Are the tokenizers of two model folders the same, and does one fit its model? Token ids must mean the same in all
experts, and every id needs a row of the embedding. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from btx.errors import CheckpointError, first_few
from btx.model_files.token_ids import Vocabulary, is_sentencepiece, read_object, read_vocabulary
from btx.system_errors import blame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JSON_BESIDE_WEIGHTS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "generation_config.json",
)  # fmt: skip
PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf", "tiktoken": "tiktoken",
            "mistral-common": "mistral_common"}  # fmt: skip
"""Package that a tokenizer may need beside transformers → its module."""
MOST_NAMED = 5


def broken_json(folder: Path) -> list[str]:
    """What is wrong with the JSON files that are copied beside the weights."""
    problems = []
    for name in JSON_BESIDE_WEIGHTS:
        try:
            if (folder / name).is_file():
                read_object(folder / name)
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


def missing_packages(folder: Path) -> str | None:
    """What has to be installed before the tokenizer in a folder can be loaded; None if nothing, or there is none."""
    if (folder / "tokenizer.json").is_file():
        return None
    needed: dict[Path, tuple[str, ...]] = {}
    for file in sorted(file for file in folder.glob("*.model") if file.is_file()):
        needed[file] = ("sentencepiece", "protobuf") if is_sentencepiece(file) else ("tiktoken",)
    if not needed and (folder / "tekken.json").is_file():
        needed[folder / "tekken.json"] = ("mistral-common",)
    for file, packages in needed.items():
        missing = [package for package in packages if not _is_installed(PACKAGES[package])]
        if missing:
            extra = " (or `pip install 'branchtrainmix[sentencepiece]'`)" if "sentencepiece" in packages else ""
            return (
                f"{file}: to load this tokenizer transformers needs {' and '.join(missing)}: "
                f"`pip install {' '.join(missing)}`{extra}; or save it once as tokenizer.json where they are installed"
            )
    return None


def usable_tokenizer(folder: Path, rows: int, warn: Callable[[str], None]) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder, if it fits an embedding of so many rows; None if there is none.

    Args:
        warn: told if packages are missing that would load it; then it is not loaded either.

    Raises:
        CheckpointError: transformers cannot load it, or an id has no row; with its files.
    """
    from transformers import AutoTokenizer

    check_ids(folder, rows)
    vocabulary = read_vocabulary(folder)
    if vocabulary is None:
        return None
    if (missing := missing_packages(folder)) is not None:
        warn(f"{missing}. The tokenizer is copied unread")
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # tokenizers fail with errors of many types
        blame(error)
        beside = [
            name for name in JSON_BESIDE_WEIGHTS[1:5] if (folder / name).is_file() and name != vocabulary.file.name
        ]
        names = ", ".join([vocabulary.file.name, *beside])
        raise CheckpointError(f"{folder}: the tokenizer ({names}) cannot be loaded: {error}") from error
    check_ids(folder, rows, tokenizer.get_vocab())
    return tokenizer


def check_ids(folder: Path, rows: int, ids: Mapping[str, int] | None = None) -> None:
    """Refuse a tokenizer with ids that have no row in the embedding; a folder without a tokenizer is fine.

    Args:
        rows: of the embedding.
        ids: token → id as loaded; default: as its files say.
    """
    vocabulary = read_vocabulary(folder)
    ids = ids if ids is not None else vocabulary.ids if vocabulary else {}
    beyond = sorted((number, token) for token, number in ids.items() if number >= rows)
    if not beyond:
        return
    file = (vocabulary.added_by.get(beyond[0][1], vocabulary.file) if vocabulary else None) or folder
    named = first_few([f"{token!r} ({number})" for number, token in beyond], MOST_NAMED)
    raise CheckpointError(
        f"{file}: {len(beyond)} token{'s' * (len(beyond) > 1)} without a row in the embedding, which has {rows:,} (ids "
        f"0 to {rows - 1:,}): {named}. Give the tokenizer the model was trained with, take these tokens out of "
        f"it, or give the model rows for them (resize_token_embeddings) and train those"
    )


def vocabulary_difference(folder: Path, seed: Path) -> str | None:
    """How the tokenizer of `folder` differs from that of `seed`: file and first difference; None if it does not.

    Sizes alone prove nothing: entries, their ids, merges and added tokens are compared, whatever files hold them.
    """
    ours, theirs = read_vocabulary(folder), read_vocabulary(seed)
    if ours is None:
        return "no tokenizer" if theirs else None
    if theirs is None:
        return f"{ours.file}: a tokenizer, which the seed model's folder lacks"
    return _ids_difference(ours, theirs) or _rules_difference(ours, theirs)


def _ids_difference(ours: Vocabulary, seed: Vocabulary) -> str | None:
    """The first token, in the order of the alphabet, that has not the same id."""
    listed = ours.lists_special and seed.lists_special  # else what one file lacks may be in code
    tokens = ours.ids.keys() | seed.ids.keys() if listed else ours.ids.keys() & seed.ids.keys()
    differing = [token for token in tokens if ours.ids.get(token) != seed.ids.get(token)]
    if not differing and (listed or tokens):
        return None
    if not differing:
        return f"{ours.file}: no token in common with {seed.file}"
    token = min(differing)
    said = [f"id {x.ids[token]}" if token in x.ids else "no entry" for x in (ours, seed)]
    file = ours.added_by.get(token, ours.file)
    return f"{file}: another vocabulary than the seed model's: {token!r} has {said[0]}, there {said[1]}"


def _rules_difference(ours: Vocabulary, seed: Vocabulary) -> str | None:
    if ours.merges is not None and seed.merges is not None and ours.merges != seed.merges:
        return f"{ours.file}: other merges than the seed model's"
    if ours.kind != seed.kind:
        return None  # they say the same in ways that cannot be compared
    for key in sorted(ours.rules.keys() | seed.rules.keys()):
        value, seed_value = ours.rules.get(key), seed.rules.get(key)
        if value != seed_value:
            if key in ("normalizer", "pre_tokenizer", "scores"):
                return f"{ours.file}: another {key} than the seed model's"
            return f"{ours.file}: {key} is {value!r}, the seed model's tokenizer has {seed_value!r}"
    return None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package it would be in
        return False
