"""What a model folder holds beside its weights and config: tokenizer, chat template, generation settings, licence."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btx.errors import CheckpointError
from btx.files import write_json
from btx.model_files.vocabularies import check_tokenizer

TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "*.tiktoken", "chat_template*",
)  # fmt: skip
OTHER = (
    "config.json", "btx.json", "mix.json", "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


def copy_beside_weights(source: Path, target: Path, *, tokenizer_from: Path | None = None) -> None:
    """Copy config, tokenizer, generation settings and licence of a model folder, overwriting those at the target.

    Args:
        tokenizer_from: folder the tokenizer and the chat template are taken from instead.
    """
    _copy(source, target, OTHER)
    _copy(tokenizer_from or source, target, TOKENIZER)


def write_generation_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Give a folder without generation settings those that its config implies."""
    file = folder / "generation_config.json"
    if not file.exists():
        tokens = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        known = {key: token for key, token in tokens.items() if token is not None}
        write_json(file, {"_from_model_config": True, **known})


def tokenizer_folder(tokenizer_from: str | None, seed_model: Path, experts: Mapping[str, Path]) -> Path | None:
    """The folder that `--tokenizer-from` names: an expert, `seed`, or a folder; None if it is not given.

    Raises:
        CheckpointError: it names nothing, or a folder without a tokenizer.
    """
    if tokenizer_from is None:
        return None
    folder = experts.get(tokenizer_from) or (seed_model if tokenizer_from == "seed" else Path(tokenizer_from))
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER[:-1]):
        raise CheckpointError(
            f"--tokenizer-from {tokenizer_from}: no tokenizer in {folder}; name an expert ({', '.join(experts)}), "
            f"`seed` or a folder"
        )
    check_tokenizer(folder)
    return folder


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_dir():
                shutil.copytree(file, target / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, target / file.name)
