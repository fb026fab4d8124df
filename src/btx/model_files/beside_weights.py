"""What a model folder holds beside its weights and config: tokenizer, chat templates, generation settings, licence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from btx.errors import CheckpointError
from btx.files import read_json, write_json

TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "tekken.json", "chat_template*", "additional_chat_templates", "*.jinja",
)  # fmt: skip
"""Files and folders that are a tokenizer's, and travel with it."""
CHAT_TEMPLATE = "chat_template.jinja"
SETTINGS = ("config.json", "btx.json", "mix.json", "generation_config.json")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def copy_beside_weights(
    source: Path, target: Path, *, tokenizer_from: Path | None = None, warn: Callable[[str], None] = lambda line: None
) -> None:
    """Copy config, tokenizer, generation settings and licence of a model folder, overwriting those at the target.

    Args:
        tokenizer_from: folder the tokenizer and the chat templates are taken from instead.
        warn: told of licence files that are left out, because they are links to somewhere else.

    Raises:
        CheckpointError: any other file is a link that leads out of its folder.
    """
    tokenizer_from = tokenizer_from or source
    check_links(source, SETTINGS)
    check_links(tokenizer_from, TOKENIZER)
    for folder, patterns in ((source, (*SETTINGS, *LEGAL)), (tokenizer_from, TOKENIZER)):
        for file in files_of(folder, patterns):
            if (why := _leads_astray(file, folder)) is not None:
                warn(f"{why}; not copied")
                continue
            copied = target / file.relative_to(folder)
            if copied.parent != target:
                copied.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(file, copied)
            except OSError as error:
                if str(error.filename) != str(file):
                    raise
                raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error


def check_links(folder: Path, patterns: tuple[str, ...] = (*SETTINGS, *TOKENIZER)) -> None:
    """Refuse links that lead out of a model folder: whoever made it may have aimed them at what is nobody's business.

    The links of the Hugging Face cache lead to its own `blobs`, and are fine.

    Raises:
        CheckpointError: names the first such link, or one that leads nowhere.
    """
    for file in files_of(folder, patterns):
        if (why := _leads_astray(file, folder)) is not None:
            raise CheckpointError(
                f"{why}; put the file itself in its place (cp --remove-destination), if it is a good one"
            )


def files_of(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """The files of a folder that are called like one of the patterns, or lie in a folder that is."""
    files = {path for pattern in patterns for path in folder.glob(pattern)}
    for path in sorted(files):
        yield from sorted(file for file in path.rglob("*") if not file.is_dir()) if path.is_dir() else (path,)


def _leads_astray(file: Path, folder: Path) -> str | None:
    """What is wrong with a link in a model folder; None for a file or a link to one inside the folder."""
    home, end = (Path(os.path.realpath(path)) for path in (folder, file))  # which, unlike resolve(), stands loops
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        home = home.parent.parent
    if not end.is_relative_to(home):
        return f"{file}: a link to {end}, which lies outside the model's folder and is not copied into others"
    return None if end.exists() else f"{file}: a link to {end}, where nothing is"


def write_generation_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Give a folder without generation settings those that its config implies."""
    file = folder / "generation_config.json"
    if not file.exists():
        tokens = {key: config.get(key) for key in SPECIAL_IDS}
        known = {key: token for key, token in tokens.items() if token is not None}
        write_json(file, {"_from_model_config": True, **known})


def add_ends(folder: Path, ends: Collection[int]) -> None:
    """Add tokens to those at which the generation settings of a folder end a text."""
    file = folder / "generation_config.json"
    settings: dict[str, Any] = read_json(file) or {}
    known = listed_ids(settings.get("eos_token_id"))
    if more := sorted(set(ends) - set(known)):
        write_json(file, settings | {"eos_token_id": [*known, *more]})


def listed_ids(declared: Any) -> list[Any]:
    """What a config or generation settings say for one of `SPECIAL_IDS`, a token, several or null, as a list."""
    return declared if isinstance(declared, list) else [] if declared is None else [declared]
