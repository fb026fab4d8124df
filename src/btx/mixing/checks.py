"""Everything that can be refused before a mix writes its first byte, in one message that lists every problem."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from btx.choices.families import Config, Family, family_of
from btx.errors import CheckpointError
from btx.mixing.inputs import GENERALIST, MixInputs, open_tensors
from btx.model_files.beside_weights import SETTINGS, TOKENIZER, check_links
from btx.model_files.checkpoints import TensorFolder, allow_open_files
from btx.model_files.vocabularies import broken_json, usable_tokenizer, vocabulary_difference
from btx.models.loading import check_config, class_tensors, config_defaults, read_config

# What may differ between the seed model and an expert without changing what the tensors mean; the seed's are kept.
HARMLESS_KEYS = {
    "_name_or_path", "name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "initializer_range", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "output_hidden_states",
    "output_attentions", "return_dict", "id2label", "label2id", "problem_type", "chunk_size_feed_forward",
    "resid_pdrop", "embd_pdrop", "residual_dropout", "pretraining_tp", "model_type",
}  # fmt: skip
MOST_SHOWN = 5
"""Tensors named in a line; the line says how many there are."""


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
    seed = _Opened.open("seed model", seed_model, problems)
    if seed is not None and seed.whole:
        problems += seed.unfit_for_mixing(any_tokenizer, warn)
    opened = {name: _Opened.open(f"expert {name}", path, problems) for name, path in experts.items()}
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
    if any(path != seed_model for path in experts.values()):  # else copies of the seed model are what is wanted
        _warn_of_twins(
            {"the seed model": seed_model, **{f"expert {name}": path for name, path in experts.items()}}, warn
        )
    tensors = {name: expert.tensors for name, expert in opened.items() if expert is not None}
    return MixInputs(seed_model, dict(experts), generalist, seed.config, seed.family, seed.tensors, tensors)


class _Opened:
    """A dense model, opened."""

    def __init__(self, who: str, folder: Path, config: Config, family: Family, tensors: TensorFolder) -> None:
        """It is taken for whole until its tensors are compared with its class's."""
        self.who = who
        self.folder = folder
        self.config = config
        self.family = family
        self.tensors = tensors
        self.whole = True

    @classmethod
    def open(cls, who: str, folder: Path, problems: list[str]) -> _Opened | None:
        """The model, None if it cannot be read; what is wrong with it is added to `problems`."""
        try:
            config = read_config(folder)
            if config.get("quantization_config"):
                raise CheckpointError(f"{folder / 'config.json'}: quantization_config: give the unquantised model")
            family = family_of(config, str(folder / "config.json"))
            tensors = open_tensors(folder, family, config, who)
        except CheckpointError as error:
            problems.append(f"{who}: {error}")
            return None
        problems += [f"{who}: {problem}" for problem in broken_json(folder)]
        opened = cls(who, folder, config, family, tensors)
        unfit = opened._unfit_for_class()
        problems += unfit
        opened.whole = not unfit
        return opened

    def _unfit_for_class(self) -> list[str]:
        """Where the tensors are not those of the config's class: what transformers would drop or make up."""
        try:
            wanted = class_tensors(self.config)
        except CheckpointError as error:
            return [f"{self.who}: {self.folder / 'config.json'}: {error}"]
        fused = {
            pattern.format(layer=layer): {part.format(layer=layer): rows for part, rows in parts.items()}
            for layer in range(int(self.config["num_hidden_layers"]))
            for pattern, parts in self.family.fused(self.config).items()
        }
        for name, parts in fused.items():
            shape = wanted.pop(name)
            wanted |= {part: (rows, *shape[1:]) for part, rows in parts.items()}
        return self._compare(wanted, "config.json asks for")

    def unfit_for_mixing(self, any_tokenizer: bool, warn: Callable[[str], None]) -> list[str]:
        """Why the MoE class, or whoever loads the result, will not take what comes from the seed model."""
        found = []
        checks: list[Callable[[], object]] = [self._check_config, partial(check_links, self.folder, SETTINGS)]
        if not any_tokenizer:
            rows = int(self.config["vocab_size"])
            checks.append(partial(check_links, self.folder, TOKENIZER))
            checks.append(partial(usable_tokenizer, self.folder, rows, warn))
        for check in checks:
            try:
                check()
            except CheckpointError as error:
                found.append(f"{self.who}: {error}")
        return found

    def _check_config(self) -> None:
        check_config(lambda: self.family.moe_config(self.config, 2, 1), self.folder / "config.json")

    def differences(self, seed: _Opened) -> list[str]:
        """Every reason why this expert does not fit the seed model."""
        file = self.folder / "config.json"
        if self.config["model_type"] != seed.config["model_type"]:
            types = f"model_type is {self.config['model_type']!r}, the seed model has {seed.config['model_type']!r}"
            return [f"{self.who}: {file}: {types}"]
        known = config_defaults(str(seed.config["model_type"])).keys() | {"rope_parameters", "head_dim"}
        found = [
            f"{self.who}: {file}: {key} is {self.config.get(key)!r}, the seed model has {seed.config.get(key)!r}"
            for key in sorted((seed.config.keys() | self.config.keys()) & known - HARMLESS_KEYS)
            if seed.config.get(key) != self.config.get(key)
        ]
        if not self.whole:  # its tensors have been named already
            return found
        shapes = {name: seed.tensors[name].shape for name in seed.tensors.names}
        return found + self._compare(shapes, "the seed model has")

    def _compare(self, wanted: Mapping[str, tuple[int, ...]], whose: str) -> list[str]:
        """Missing tensors, extra tensors, other shapes and types, a line each."""
        found = []
        missing = sorted(name for name in wanted if name not in self.tensors)
        extra = [name for name in self.tensors.names if name not in wanted]
        if missing:
            found.append(f"{self.who}: {self.tensors.file}: lacks {_listed(missing)}, which {whose}")
        if extra:
            found.append(f"{self.who}: {self.tensors.where(extra[0])}: has {_listed(extra)}, unlike what {whose}")
        for name in self.tensors.names:
            tensor, file = self.tensors[name], self.tensors.where(name)
            if name in wanted and tensor.shape != wanted[name]:
                found.append(f"{self.who}: {file}: {name} is {tensor.shape}, {whose} {wanted[name]}")
            elif not tensor.dtype.is_floating_point:
                found.append(f"{self.who}: {file}: {name} is of type {tensor.dtype}; weights have to be floating point")
        shown = found[: MOST_SHOWN + 2]
        return shown + [f"{self.who}: and {len(found) - len(shown)} more like it"] * (len(found) > len(shown))


def _listed(names: list[str]) -> str:
    """`3 tensors: a, b, c`, shortened."""
    more = ", ..." if len(names) > MOST_SHOWN else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)}: {', '.join(names[:MOST_SHOWN])}{more}"


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
        warn(f"expert {name}: {folder}: {difference}; taken to be the seed model's")
        return []
    return [f"expert {name}: {difference}; if it is harmless, choose one with --tokenizer-from {name} or seed"]


def _warn_of_twins(folders: Mapping[str, Path], warn: Callable[[str], None]) -> None:
    same: dict[str, list[str]] = {}
    for name, folder in folders.items():
        same.setdefault(os.path.realpath(folder), []).append(name)
    for names in same.values():
        if len(names) > 1:
            warn(f"{', '.join(names[:-1])} and {names[-1]} are the same folder: {folders[names[0]]}")
