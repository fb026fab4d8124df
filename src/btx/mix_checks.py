"""Everything that can be refused before a mix writes its first byte, in one message that lists every problem."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btx.checkpoints import TensorFolder
from btx.errors import CheckpointError
from btx.families import Config, family_of
from btx.mix_inputs import GENERALIST, MixInputs, open_tensors
from btx.models import read_config

# Values that may differ between the seed model and an expert without changing what the tensors mean.
HARMLESS_KEYS = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range",
    "attention_dropout", "pad_token_id", "name_or_path",
}  # fmt: skip


def open_checked(seed_model: Path, experts: Mapping[str, Path], generalist: bool) -> MixInputs:
    """Open all models and refuse, in one message, everything that does not fit.

    Raises:
        CheckpointError: with a line for every problem.
    """
    config = read_config(seed_model)
    family = family_of(config, str(seed_model))
    if GENERALIST in experts:
        raise CheckpointError(f"an expert cannot be called {GENERALIST!r}: the word names the seed model's expert")
    if len(experts) + generalist < 2:
        raise CheckpointError("a mixture needs at least two experts; give another expert or keep the generalist")
    problems: list[str] = []
    seed_tensors = open_tensors(seed_model, family, config)
    opened: dict[str, TensorFolder] = {}
    for name, path in experts.items():
        try:
            expert_config = read_config(path)
            opened[name] = open_tensors(path, family, config)
            problems += _differences(name, path, config, expert_config, seed_tensors, opened[name])
        except CheckpointError as error:
            problems.append(f"expert {name}: {error}")
    if problems:
        raise CheckpointError(
            "these models cannot be mixed:\n  " + "\n  ".join(problems)
            + f"\nEvery expert has to be branched from {seed_model} and keep its shape and tokenizer."
        )  # fmt: skip
    return MixInputs(seed_model, dict(experts), generalist, config, family, seed_tensors, opened)


def _differences(
    name: str, path: Path, seed: Config, expert: Config, seed_tensors: TensorFolder, tensors: TensorFolder
) -> list[str]:
    """Every reason why an expert does not fit the seed model."""
    found = [
        f"expert {name}: {path / 'config.json'}: {key} is {expert.get(key)!r}, the seed model has {seed.get(key)!r}"
        for key in sorted(seed.keys() | expert.keys())
        if key not in HARMLESS_KEYS and seed.get(key) != expert.get(key)
    ]
    missing = [tensor for tensor in seed_tensors.names if tensor not in tensors]
    extra = [tensor for tensor in tensors.names if tensor not in seed_tensors]
    if missing:
        found.append(f"expert {name}: {path}: lacks {len(missing)} tensors, first {missing[0]}")
    if extra:
        found.append(f"expert {name}: {path}: has {len(extra)} tensors the seed model lacks, first {extra[0]}")
    found += [
        f"expert {name}: {tensors.where(tensor)}: {tensor} is {tensors[tensor].shape}, "
        f"the seed model's is {seed_tensors[tensor].shape}"
        for tensor in tensors.names
        if tensor in seed_tensors and tensors[tensor].shape != seed_tensors[tensor].shape
    ][:3]
    if _vocabulary(path) != _vocabulary(seed_tensors.folder):
        found.append(f"expert {name}: {path / 'tokenizer.json'}: another vocabulary than the seed model's")
    return found


def _vocabulary(folder: Path) -> Any:
    """Vocabulary and added tokens of a fast tokenizer, None if the folder has none."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    tokenizer = json.loads(file.read_text("utf-8"))
    return tokenizer.get("model", {}).get("vocab"), tokenizer.get("added_tokens")
