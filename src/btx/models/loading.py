"""Loading models and tokenizers: folders or hub names, safetensors only, no code from the model's folder.

This is the one place where torch models are read; every stage gets its weights here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from btx.choices.families.configs import with_dtype, with_rope
from btx.choices.routers import RoutingRule
from btx.data.tokenizer import save_tokenizer
from btx.errors import CheckpointError
from btx.files import write_json
from btx.model_files.beside_weights import copy_beside_weights, write_generation_config
from btx.model_files.btx_folder import FILE, is_btx_folder, open_btx_folder
from btx.model_files.model_folder import check_model
from btx.moe.layer import set_router, swap_in_moe
from btx.process import quick_imports
from btx.system_errors import blame

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def quiet_transformers() -> None:
    """Errors only, no progress bars: a stage reports on its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@quick_imports()
def load_model(path: str | Path, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model with btx's MoE blocks in place, on CPU, in evaluation mode.

    A folder that only btx reads (`btx.model_files.btx_folder`) has its own router; other MoE models route by Top-K.

    Args:
        path: folder as `save_pretrained` writes it, or a hub name.
        revision: git revision of a hub name.
        dtype: type of the weights in memory.

    Raises:
        CheckpointError: no such model, pickled weights, unknown class, tensors that do not fit.
    """
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    config, router = _own_config(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            revision=revision or "main",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        blame(error)
        raise CheckpointError(f"{path}: this is no model that can be loaded: {error}") from error
    model: PreTrainedModel = loaded[0]
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, loaded[1].get(kind) or ())) for kind in kinds}
    if any(wrong.values()):
        found = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:5])}" for kind, names in wrong.items() if names)
        raise CheckpointError(f"{path}: the tensors do not fit the config's class {type(model).__name__}: {found}")
    swap_in_moe(model)
    if router is not None:
        set_router(model, router)
    return model.eval()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let `model` recompute activations in the backward pass. Re-entrant checkpoints would lose the routers' losses."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.24
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@quick_imports()
def load_tokenizer(path: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        CheckpointError: there is none, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    quiet_transformers()
    if isinstance(path, Path) and not path.exists():
        raise CheckpointError(f"{path}: there is no such folder")
    own = _own_config(path)[0] if (Path(path) / FILE).exists() else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), config=own, revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        blame(error)
        raise CheckpointError(f"{path}: this folder has no tokenizer that can be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{path}: the tokenizer has no end-of-text token (eos_token); set one before branching")
    return tokenizer


@quick_imports()
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
        blame(error)
        raise CheckpointError(f"seed_model.config: transformers cannot build this model: {error}") from error
    return model


@quick_imports()
def read_config(path: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """config.json of a folder or hub name as plain values, completed with the class's defaults."""
    from transformers import AutoConfig

    config, _ = _own_config(path)
    if config is not None:
        return config.to_dict()
    try:
        config = AutoConfig.from_pretrained(str(path), revision=revision or "main", trust_remote_code=False).to_dict()
    except Exception as error:  # config classes check their values with errors of many types
        blame(error)
        raise CheckpointError(f"{Path(path) / 'config.json'}: this is no model: {error}") from error
    return config


def config_defaults(model_type: str) -> dict[str, Any]:
    """The values of a class's config when nothing is said."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type).to_dict()


def check_config(make: Callable[[], dict[str, Any]], where: Path) -> None:
    """Refuse a config that is made of the one at `where` and that its class does not take.

    Raises:
        CheckpointError: with what the class says.
    """
    from transformers import AutoConfig

    try:
        AutoConfig.for_model(**make())
    except Exception as error:  # config classes check their values with errors of many types
        blame(error)
        raise CheckpointError(f"{where}: the MoE class does not take these values: {error}") from error


def class_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a folder with this config has to hold; nothing is allocated.

    Weights tied to others (the LM head to the embeddings) are left out.

    Raises:
        CheckpointError: transformers cannot build the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_transformers()
    values = {key: value for key, value in config.items() if key != "model_type"}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values))
    except Exception as error:
        blame(error)
        raise CheckpointError(f"transformers cannot build this model: {error}") from error
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _own_config(path: str | Path) -> tuple[PreTrainedConfig | None, RoutingRule | None]:
    """Config and router of a folder that only btx reads; None for any other. Broken folders are refused."""
    from transformers import AutoConfig

    found = check_model(path)
    if found is not None and is_btx_folder(found):
        plain, router = open_btx_folder(Path(path), found)
        values = {key: value for key, value in plain.items() if key != "model_type"}
        return AutoConfig.for_model(plain["model_type"], **values), router
    return None, None


def save_model(model: PreTrainedModel, folder: Path, *, like: Path | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a model folder that any engine reads, in the published layout, without btx.

    Args:
        folder: an existing folder.
        like: folder of the model this one was trained from; its config, tokenizer and generation settings are kept as
            they are, and the weights get its type. None for a model from scratch.
        tokenizer: written when there is no `like`.
    """
    if like is None:
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        rope = config.get("rope_parameters")
        if rope and "rope_theta" in rope:
            config = with_rope(config, rope)
        write_json(folder / "config.json", with_dtype(config, str(config.get("dtype") or "float32")))
        write_generation_config(folder, config)
        return
    declared = json.loads((like / "config.json").read_text("utf-8"))
    dtype = getattr(torch, str(declared.get("dtype") or declared.get("torch_dtype") or "float32"))
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    copy_beside_weights(like, folder)
