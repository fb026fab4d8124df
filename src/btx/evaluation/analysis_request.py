"""What can be refused about `btx analyze MODEL` before a model is read, and the texts it reads. Plain Python."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from btx.choices.families import FAMILIES
from btx.data.document_files import find_files, read
from btx.errors import CheckpointError, DataError, UserError
from btx.model_files.btx_folder import is_btx_folder, open_btx_folder
from btx.model_files.model_folder import BTM_FILE, check_model
from btx.recipe.data import Source

BYTES_A_TOKEN = 16
"""Bytes of text that are read for each token wanted: enough for any tokenizer."""
NUMBER_OF_EXPERTS = re.compile(r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts")
TOKENS, EXAMPLES, TEXT_KEY = 50_000, 3, "text"
"""Of each text, where nothing else is asked for."""
MARK = "routing.json"
"""A folder with this file is an analysis, and may be written anew."""


def check_analysis(model: str | Path, texts: Mapping[str, Path], output: Path) -> None:
    """Refuse a model that is none or dense, no text, and an output that is something else."""
    if not texts:
        raise UserError(f"btx analyze {model}: a model is analysed on text; give it by domain: --text NAME=FILE, for "
                        f"example --text math=math.jsonl --text code=code.jsonl")  # fmt: skip
    if isinstance(model, Path) and (model / BTM_FILE).is_file():
        raise CheckpointError(f"{model}: Branch-Train-Merge has models side by side, and no router in its layers")
    config = check_model(model)
    if config is not None and is_btx_folder(config):
        config, _ = open_btx_folder(Path(model), config)
    if config is not None and not has_experts(config):
        raise CheckpointError(f"{model}: this is a dense model ({config['model_type']}): it has no experts to route to")
    if output.exists() and not (output.is_dir() and ((output / MARK).is_file() or not any(output.iterdir()))):
        raise UserError(f"{output}: exists already and is no analysis; choose another folder with -o")


def check_run_alone(run: Path, *settings: object) -> None:
    """Refuse what goes with a model, for a run."""
    if any(settings):
        raise UserError(f"{run} is a run, which is analysed on its own held-out text, as its recipe says (`analyze`): "
                        f"text and its key, output, tokens, examples and dropped experts go with a model, for example "
                        f"{run / 'finetune' / 'model'}")  # fmt: skip


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a MoE model: its class is one, or it says how many experts there are."""
    counts = (value for key, value in _entries(config) if NUMBER_OF_EXPERTS.fullmatch(key))
    is_moe = config.get("model_type") in {family.moe for family in FAMILIES}
    return is_moe or any(isinstance(count, int) and count > 1 for count in counts)


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _entries(value)
        else:
            yield key, value


def read_texts(texts: Mapping[str, Path], tokens: int, text_key: str = TEXT_KEY) -> dict[str, list[str]]:
    """The first documents of each domain's files, enough for so many tokens.

    Args:
        texts: domain → file, folder or glob in the formats that recipes read (`btx.data.document_files`).
        text_key: key of the text on the lines of a .jsonl file, or column of a .parquet file.

    Raises:
        DataError: no such file, broken, or empty; names the domain.
    """
    documents_of: dict[str, list[str]] = {}
    for domain, path in texts.items():
        documents: list[str] = []
        size = 0
        try:
            for text in read(find_files(str(path), None), Source(path=str(path), text=text_key)):
                if text.strip():
                    documents.append(text[: BYTES_A_TOKEN * tokens])
                    size += len(documents[-1].encode())
                if size >= BYTES_A_TOKEN * tokens:
                    break
        except DataError as error:
            raise DataError(f"--text {domain}: {error}") from error
        if not documents:
            raise DataError(f"--text {domain}: {path}: there is no text in it")
        documents_of[domain] = documents
    return documents_of


def dropped_experts(without: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """Indices of the experts that are left out, in the order given; None for none.

    Raises:
        UserError: one that the model does not have, named twice, or none would be left.
    """
    for name in without:
        if name not in names:
            raise UserError(f"--without {name}: the model has no such expert; its experts: {', '.join(names)}")
    if len(set(without)) < len(without):
        raise UserError(f"--without: an expert is named twice ({', '.join(without)})")
    if len(without) >= len(names):
        raise UserError(f"--without: no expert would be left of {', '.join(names)}")
    return [names.index(name) for name in without] if without else None
