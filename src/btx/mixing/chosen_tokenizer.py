"""The tokenizer that was chosen for a mixed model (`--tokenizer-from`), and the special ids that follow. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx.errors import CheckpointError
from btx.files import write_json
from btx.model_files.beside_weights import SPECIAL_IDS, TOKENIZER, check_links, listed_ids
from btx.model_files.hub import local_model
from btx.model_files.token_ids import read_object, read_vocabulary
from btx.model_files.vocabularies import usable_tokenizer


def tokenizer_folder(tokenizer_from: str | None, seed_model: Path, experts: Mapping[str, Path]) -> Path | None:
    """The folder that `--tokenizer-from` names: an expert, `seed`, or a folder; None if it is not given.

    Raises:
        CheckpointError: it names nothing, or a folder without a tokenizer.
    """
    if tokenizer_from is None:
        return None
    named = experts.get(tokenizer_from) or (seed_model if tokenizer_from == "seed" else Path(tokenizer_from))
    folder = local_model(named)
    if not folder.is_dir() or read_vocabulary(folder) is None:
        raise CheckpointError(
            f"--tokenizer-from {tokenizer_from}: no tokenizer in {folder}; name an expert ({', '.join(experts)}), "
            f"`seed` or a folder"
        )
    check_links(folder, TOKENIZER)
    return folder


CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class ChosenTokenizer:
    """A tokenizer, and what a model with it has to know."""

    folder: Path
    special_ids: Mapping[str, int | None]
    """Its `bos_token_id`, `eos_token_id` and `pad_token_id`; empty if it cannot be loaded here."""
    seed_model: Path

    @classmethod
    def open(cls, folder: Path, seed_model: Path, rows: int, warn: Callable[[str], None]) -> ChosenTokenizer:
        """The tokenizer in a folder, checked against the embedding of the model it is chosen for.

        Args:
            seed_model: folder of the model whose special ids its own take the place of.
            rows: of that model's embedding.
            warn: told if packages are missing that would load it.
        """
        for name in CONFIGS:  # refused before anything is written
            _said(folder / name)
        tokenizer = usable_tokenizer(folder, rows, warn)
        return cls(folder, {key: getattr(tokenizer, key, None) for key in SPECIAL_IDS}, seed_model)

    def config_with_its_ids(self, target: Path, config: dict[str, Any]) -> dict[str, Any]:
        """The config of a new folder with the tokenizer's special ids; its generation settings are changed in place.

        Where the tokenizer comes with a model, its config.json and generation_config.json say the ids, lists of
        end-of-text ids included; else those ids stay that mean the same in both tokenizers. What the tokenizer itself
        says is always among them, and comes first. A padding token that is also another one is not written into
        config.json: transformers would then never train its embedding.
        """
        config_here, generation_here = (_said(self.folder / name) for name in CONFIGS)
        generation, changed = read_object(target / "generation_config.json"), dict(config)
        generation.pop("_from_model_config", None)
        same = self._same_ids() if config_here is None else set()
        for key in SPECIAL_IDS:
            if config_here is not None:
                declared = config_here.get(key), (generation_here or {}).get(key, config_here.get(key))
            else:
                declared = _kept(config.get(key), same), _kept(generation.get(key), same)
            token, others = self.special_ids[key], [self.special_ids[other] for other in SPECIAL_IDS if other != key]
            changed[key] = (
                declared[0] if key == "pad_token_id" and token in others else _with(token, declared[0], False)
            )
            if (ids := _with(token, declared[1], key == "eos_token_id")) is None:
                generation.pop(key, None)
            else:
                generation[key] = ids
        write_json(target / "generation_config.json", generation)
        return changed

    def _same_ids(self) -> set[int]:
        """Ids that mean the same in the seed model's tokenizer."""
        here, there = read_vocabulary(self.folder), read_vocabulary(self.seed_model)
        return (
            {number for token, number in here.ids.items() if there.ids.get(token) == number}
            if here and there
            else set()
        )


def _said(file: Path) -> dict[str, Any] | None:
    """A model's config or generation settings, its special ids checked; None if there is no such file."""
    if not file.is_file():
        return None
    said = read_object(file)
    for key in SPECIAL_IDS:
        value = said.get(key)
        if not all(isinstance(token, int) for token in listed_ids(value)):
            raise CheckpointError(f"{file}: {key} is {value!r}: expected an id, a list of ids or null")
    return said


def _kept(ids: Any, same: set[int]) -> Any:
    """An id, or those of a list, as far as they mean the same; None if nothing is left."""
    if isinstance(ids, list):
        return [token for token in ids if token in same] or None
    return ids if ids is not None and ids in same else None


def _with(token: int | None, ids: Any, several: bool) -> Any:
    """Ids with the tokenizer's own among them; it replaces a single other one unless there may be several."""
    listed = listed_ids(ids)
    if token is None or token in listed:
        return ids
    return [token, *listed] if listed and (several or isinstance(ids, list)) else token
