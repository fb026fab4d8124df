"""Loading models and tokenizers: folders or hub names, safetensors only, no code from the model's folder.

This is the one place where torch models are read; every stage gets its weights here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from btx.errors import CheckpointError
from btx.moe import swap_in_moe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def quiet_transformers() -> None:
    """Errors only, no progress bars: a stage reports on its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(path: str | Path, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model with btx's MoE blocks in place, on CPU, in evaluation mode.

    Args:
        path: folder as `save_pretrained` writes it, or a hub name.
        revision: git revision of a hub name.
        dtype: type of the weights in memory.

    Raises:
        CheckpointError: no such model, pickled weights, unknown class, tensors that do not fit.
    """
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    _refuse_broken_folder(path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), revision=revision or "main", dtype=dtype, use_safetensors=True, trust_remote_code=False,
            attn_implementation="sdpa", output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: this is no model that can be loaded: {error}") from error
    wrong = {kind: sorted(map(str, info.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        found = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:5])}" for kind, names in wrong.items() if names)
        raise CheckpointError(f"{path}: the tensors do not fit the config's class {type(model).__name__}: {found}")
    swap_in_moe(model)
    return model.eval()


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        CheckpointError: there is none, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    quiet_transformers()
    _refuse_broken_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: this folder has no tokenizer that can be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{path}: the tokenizer has no end-of-text token (eos_token); set one before branching")
    return tokenizer


def new_model(config: dict[str, Any], *, rng_seed: int, **overrides: Any) -> PreTrainedModel:
    """A model from scratch, float32, initialised from `rng_seed` alone.

    Args:
        config: `model_type` and what its transformers config class takes.
        overrides: config values that the tokenizer decides (vocab_size, bos_token_id, ...).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_transformers()
    try:
        values = {key: value for key, value in config.items() if key != "model_type"}
        built = AutoConfig.for_model(config["model_type"], **(values | overrides))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng_seed)
            model = AutoModelForCausalLM.from_config(built, dtype=torch.float32, attn_implementation="sdpa")
    except Exception as error:
        raise CheckpointError(f"seed_model.config: transformers cannot build this model: {error}") from error
    return model


def read_config(path: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """config.json of a folder or hub name as plain values, completed with the class's defaults."""
    from transformers import AutoConfig

    _refuse_broken_folder(path)
    try:
        return AutoConfig.from_pretrained(str(path), revision=revision or "main", trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: this is no model: {error}") from error


def _refuse_broken_folder(path: str | Path) -> None:
    folder = Path(path)
    if not folder.exists():
        if isinstance(path, Path) or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
            raise CheckpointError(f"{path}: there is no such folder")
        return  # a hub name
    if not folder.is_dir():
        raise CheckpointError(f"{path}: a model is a folder, as save_pretrained writes it; this is a file")
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{folder}: this folder holds no model: config.json is missing")
    try:
        declared = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config}: not readable as JSON: {error}") from error
    if not isinstance(declared, dict) or "model_type" not in declared:
        raise CheckpointError(f"{config}: no model_type: this is no transformers model")
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder}: only pickled weights (.bin), which can run code when read; convert them once with "
            f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
