"""LoRA adapters as peft saves them: adapter_config.json and adapter_model.safetensors, read and checked. No torch.

What can be merged is A and B of plain linear weights (Hu et al., arXiv 2106.09685): W + s B A, with s = alpha / r, or
alpha / √r with `use_rslora` (arXiv 2312.03732). All else that peft can do is refused by name, with what to do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from btx.errors import CheckpointError
from btx.model_files.beside_weights import check_links
from btx.model_files.headers import FLOATS, INDEX, ONE_FILE, Entry, read_header
from btx.model_files.token_ids import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
"""What peft puts before the names of the model's own modules."""
A, B = ".lora_A.weight", ".lora_B.weight"
KEYS_READ = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
             "init_lora_weights", "bias"}  # fmt: skip
KEYS_OF_TRAINING = {
    "auto_mapping", "revision", "task_type", "inference_mode", "peft_version", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "megatron_config", "megatron_core",
    "runtime_config", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "velora_config",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
"""Keys that do not change what the tensors mean; fan_in_fan_out is for layers that no family here has."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they were; pissa, olora and others take something out."""
MERGE_FIRST = (
    "merge it with peft and give the model: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
    ".save_pretrained(NEW)"
)


class LowRank(NamedTuple):
    """What is added to one weight W (out, in): scaling · B A."""

    a: Entry
    """(r, in)"""
    b: Entry
    """(out, r)"""
    scaling: float


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter, its config and headers read."""

    folder: Path
    base: str | None
    """The model it was trained on, as its config names it: a hub name or a folder."""
    added: Mapping[str, LowRank]
    """Name of a weight → what is added to it."""

    @classmethod
    def open(cls, folder: Path) -> AdapterFolder:
        """Read an adapter's folder.

        Raises:
            CheckpointError: broken or pickled files, another kind of adapter, tensors that are more than A and B of
                linear weights.
        """
        check_links(folder, (CONFIG, WEIGHTS))
        config = read_object(folder / CONFIG)
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder}: {_without_weights(folder, config)}")
        if problem := _config_problem(config):
            raise CheckpointError(f"{folder / CONFIG}: {problem}")
        base = config.get("base_model_name_or_path")
        return cls(folder, base if isinstance(base, str) and base else None, _added(folder / WEIGHTS, config))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model's weights beside it."""
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in (ONE_FILE, INDEX))


def _config_problem(config: Mapping[str, Any]) -> str | None:
    if (kind := config.get("peft_type")) != "LORA":
        return f"peft_type {kind!r}: of all adapters only LORA is merged here; {MERGE_FIRST}"
    if config.get("bias", "none") != "none":
        return f"bias {config['bias']!r}: biases were trained too, which no expert has; train with bias none"
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        start = config["init_lora_weights"]
        return f"init_lora_weights {start!r}: this start changes the base model's weights as well; {MERGE_FIRST}"
    unknown = sorted(key for key, value in config.items() if value and key not in KEYS_READ | KEYS_OF_TRAINING)
    if unknown:
        named = ", ".join(f"{key}: {config[key]}" for key in unknown)
        return f"{named[:300]}: more than plain LoRA on linear weights; {MERGE_FIRST}"
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            return f"{key} is {config.get(key)!r}: expected a number above 0"
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(_is_positive, patterns.values())):
            return f"{key} is {patterns!r}: expected patterns of names with a number above 0 each"
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                return f"{key}: {pattern!r} is no regular expression: {error}"
    return None


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _without_weights(folder: Path, config: Mapping[str, Any]) -> str:
    base = config.get("base_model_name_or_path") or "a model it does not name"
    what = f"an adapter ({config.get('peft_type') or 'PEFT'}, {CONFIG}) of {base}"
    if (folder / PICKLED).is_file():
        return (
            f"{what} with pickled weights only ({PICKLED}), which can run code when read; convert them once in an "
            f"environment you trust: load it with peft and save_pretrained(NEW), which writes {WEIGHTS}"
        )
    return f"{what} without its weights: there is no {WEIGHTS}; download or save the adapter again"


def _added(file: Path, config: Mapping[str, Any]) -> dict[str, LowRank]:
    """Weight → A, B and scaling; raises CheckpointError for anything else in the file."""
    tensors = read_header(file)
    deltas = {}
    for name, entry in sorted(tensors.items()):
        if not name.startswith(PREFIX) or not name.endswith((A, B)):
            raise CheckpointError(f"{file}: {name} is no A or B of a linear weight ({PREFIX}...{A}); {MERGE_FIRST}")
        if entry.dtype not in FLOATS or len(entry.shape) != 2:
            raise CheckpointError(f"{file}: {name} is {entry.dtype} {list(entry.shape)}: expected a matrix of floats")
        module = name.removeprefix(PREFIX).removesuffix(A).removesuffix(B)
        a, b = (tensors.get(f"{PREFIX}{module}{ending}") for ending in (A, B))
        if a is None or b is None:
            raise CheckpointError(f"{file}: {module} has an A without B, or a B without A")
        rank = _of_module(module, config.get("rank_pattern"), config["r"])
        if a.shape[0] != rank or b.shape[1] != rank:
            raise CheckpointError(f"{file}: {module}: A is {a.shape} and B {b.shape}, but {CONFIG} says rank {rank}")
        alpha = _of_module(module, config.get("alpha_pattern"), config["lora_alpha"])
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        deltas[f"{module}.weight"] = LowRank(a, b, scaling)
    if not deltas:
        raise CheckpointError(f"{file}: holds no tensors; save the adapter again")
    return deltas


def _of_module(module: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """The value of the first pattern that the end of the name is like, as peft looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
