"""Everything that can be refused before a mix writes its first byte, in one message that lists every problem."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from btx.choices.families import Config, Family, family_of
from btx.errors import CheckpointError
from btx.mixing.inputs import GENERALIST, MixInputs, open_tensors
from btx.model_files.adapter_folder import AdapterFolder, is_adapter
from btx.model_files.beside_weights import SETTINGS, TOKENIZER, check_links
from btx.model_files.checkpoints import TensorFolder, allow_open_files
from btx.model_files.headers import HEAD
from btx.model_files.provenance import other_base
from btx.model_files.vocabularies import broken_json, usable_tokenizer, vocabulary_difference
from btx.models.config_meaning import differences
from btx.models.configs import completed, read_config
from btx.models.whole import class_problems, shape_problems

SAFE_TO_CHANGE = {"max_position_embeddings", "rope_parameters", "rms_norm_eps", "hidden_act", "sliding_window"}


def open_checked(
    seed_model: Path,
    experts: Mapping[str, Path],
    generalist: bool,
    *,
    any_tokenizer: bool = False,
    warn: Callable[[str], None] = lambda line: None,
) -> MixInputs:
    """Open all models and refuse, in one message, everything that does not fit.

    Args:
        any_tokenizer: the user has chosen the tokenizer, so vocabularies may differ.
        warn: called with what is odd but allowed.

    Raises:
        CheckpointError: with a line for every problem.
    """
    problems = _names_and_number(experts, generalist)
    allow_open_files((seed_model, *experts.values()))
    seed = Opened.open("seed model", seed_model, problems)
    if seed is not None and seed.whole:
        problems += seed.unfit_for_mixing(any_tokenizer, warn)
    opened = {
        name: Opened.adapted(f"expert {name}", path, seed, problems, warn) if is_adapter(path)
        else Opened.open(f"expert {name}", path, problems)
        for name, path in experts.items()
    }  # fmt: skip
    if seed is not None and seed.whole:
        for name, expert in opened.items():
            if expert is not None:
                problems += expert.differences(seed)
                problems += [] if any_tokenizer else _vocabulary_problems(name, expert.folder, seed.folder, warn)
    if problems:
        raise CheckpointError(
            "these models cannot be mixed:\n  " + "\n  ".join(problems)
            + f"\nEvery expert has to be branched from {seed_model} and keep its shape and tokenizer. "
            + "Nothing was written."
        )  # fmt: skip
    assert seed is not None  # or there were problems
    if any(path != seed_model for path in experts.values()):  # else the same folder again is what is wanted: upcycling
        _warn_of_twins(
            {"the seed model": seed_model, **{f"expert {name}": path for name, path in experts.items()}}, warn
        )
    _warn_of_heads([seed, *(expert for expert in opened.values() if expert and not is_adapter(expert.folder))], warn)
    tensors = {name: expert.tensors for name, expert in opened.items() if expert is not None}
    return MixInputs(seed_model, dict(experts), generalist, seed.config, seed.family, seed.tensors, tensors)


@dataclass
class Opened:
    """A dense model, opened."""

    who: str
    folder: Path
    config: Config
    """Completed with its class's defaults."""
    family: Family
    tensors: TensorFolder
    whole: bool = True
    """Its tensors are those of its class."""

    @classmethod
    def open(
        cls, who: str, folder: Path, problems: list[str], family_of: Callable[[Config, str], Family] = family_of
    ) -> Opened | None:
        """The model, None if it cannot be read; what is wrong with it is added to `problems`, with its name.

        Args:
            family_of: the family of a config that was read from a place.
        """
        try:
            config = read_config(folder)
            family = family_of(config, str(folder / "config.json"))
            broken = class_problems(folder, config)
            opened = cls(who, folder, config, family, open_tensors(folder, family, config, who), whole=not broken)
        except CheckpointError as error:
            problems.append(f"{who}: {error}")
            return None
        problems += [f"{who}: {problem}" for problem in [*broken_json(folder), *broken]]
        return opened

    @classmethod
    def adapted(
        cls, who: str, folder: Path, seed: Opened | None, problems: list[str], warn: Callable[[str], None]
    ) -> Opened | None:
        """The seed model with an adapter merged in; None if that cannot be; why is added to `problems`.

        Args:
            folder: the adapter's; it may hold a tokenizer.
            seed: None if it could not be opened, which has been told.
            warn: told if nothing says that the adapter was trained on this seed model.
        """
        try:
            adapter = AdapterFolder.open(folder)
            if seed is None or not seed.whole:
                return None
            tensors = open_tensors(seed.folder, seed.family, seed.config, who, adapter)
        except CheckpointError as error:
            problems.append(f"{who}: {error}")
            return None
        problems += [f"{who}: {problem}" for problem in broken_json(folder)]
        if (assumed := other_base(adapter, seed.folder)) is not None:
            warn(f"{who}: {assumed}")
        return cls(who, folder, seed.config, seed.family, tensors)

    def unfit_for_mixing(self, any_tokenizer: bool, warn: Callable[[str], None]) -> list[str]:
        """Why the MoE class, or whoever loads the result, will not take what comes from the seed model."""
        problems = []
        checks: list[Callable[[], object]] = [
            partial(self.moe_config, 2, 1), partial(check_links, self.folder, SETTINGS)
        ]  # fmt: skip
        if not any_tokenizer:
            rows = int(self.config["vocab_size"])
            checks.append(partial(check_links, self.folder, TOKENIZER))
            checks.append(partial(usable_tokenizer, self.folder, rows, warn))
        for check in checks:
            try:
                check()
            except CheckpointError as error:
                problems.append(f"{self.who}: {error}")
        return problems

    def moe_config(self, num_experts: int, top_k: int) -> Config:
        """The MoE config made of this model's, completed with its class's defaults."""
        return completed(
            lambda: self.family.moe_config(self.config, num_experts, top_k), self.folder / "config.json",
            "the MoE class",
        )  # fmt: skip

    def differences(self, seed: Opened) -> list[str]:
        """Every reason why this expert does not fit the seed model."""
        file = self.folder / "config.json"
        if self.config["model_type"] != seed.config["model_type"]:
            types = f"model_type is {self.config['model_type']!r}, the seed model has {seed.config['model_type']!r}"
            return [f"{self.who}: {file}: {types}"]
        problems = [
            f"{self.who}: {file}: {key} is {value!r}, the seed model has {other!r}{what_to_do(key, seed.folder)}"
            for key, (value, other) in differences(self.config, seed.config).items()
        ]
        if not self.whole:  # its tensors have been named already
            return problems
        where = {name: self.tensors.where(name) for name in self.tensors.names}
        return problems + [f"{self.who}: {problem}" for problem in shape_problems(
            self.tensors.shapes(), seed.tensors.shapes(), self.tensors.file, where, "the seed model has")]  # fmt: skip


def what_to_do(key: str, other: Path) -> str:
    """For a value that is no tensor's shape: what to change if the two models are alike and one file is wrong."""
    if key not in SAFE_TO_CHANGE:
        return ""
    return f" (if they were trained alike, one file is wrong: set {key} there, or in {other / 'config.json'})"


def _names_and_number(experts: Mapping[str, Path], generalist: bool) -> list[str]:
    problems = []
    for name in experts:
        if name == GENERALIST:
            problems.append(f"expert {name}: an expert cannot be called so: the word names the seed model's expert")
        elif not re.fullmatch(r"[\w.-]{1,64}", name):
            problems.append(f"expert {name!r}: a name is 1 to 64 letters, digits, '_', '-' or '.'")
    if len(experts) + generalist < 2:
        problems.append(f"{len(experts)} expert: a mixture needs two; give another expert or keep the generalist")
    return problems


def _vocabulary_problems(name: str, folder: Path, seed: Path, warn: Callable[[str], None]) -> list[str]:
    try:
        difference = vocabulary_difference(folder, seed)
    except CheckpointError as error:
        return [f"expert {name}: {error}"]
    if difference is None:
        return []
    if difference.startswith("no tokenizer"):
        if is_adapter(folder):  # most are saved without
            return []
        warn(f"expert {name}: {folder}: {difference}; taken to be the seed model's")
        return []
    return [f"expert {name}: {difference}; if it is harmless, choose one with --tokenizer-from {name} or seed"]


def _warn_of_heads(models: Iterable[Opened], warn: Callable[[str], None]) -> None:
    for model in models:
        declared = json.loads((model.folder / "config.json").read_text("utf-8"))
        if declared.get("tie_word_embeddings") and not model.config.get("tie_word_embeddings"):
            warn(f"{model.who}: {model.tensors.where(HEAD)}: {HEAD} differs from the embeddings, though config.json "
                 f"says tie_word_embeddings: true; the head is kept, and the new config.json says false")  # fmt: skip


def _warn_of_twins(folders: Mapping[str, Path], warn: Callable[[str], None]) -> None:
    same: dict[str, list[str]] = {}
    for name, folder in folders.items():
        same.setdefault(os.path.realpath(folder), []).append(name)
    for names in same.values():
        if len(names) > 1:
            warn(f"{', '.join(names[:-1])} and {names[-1]} are the same folder: {folders[names[0]]}")
