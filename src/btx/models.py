"""Loading models and tokenizers: folders or hub names, safetensors only, no code from the model's folder.

This is the one place where torch models are read; every stage gets its weights here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from btx.btx_folder import FILE, is_btx_folder, open_btx_folder
from btx.errors import CheckpointError
from btx.folders import write_json
from btx.model_folder import check_model_folder
from btx.moe import set_router, swap_in_moe
from btx.router_kinds import RoutingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What a model folder holds beside its weights.
BESIDE_WEIGHTS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template*", FILE,
)  # fmt: skip


def quiet_transformers() -> None:
    """Errors only, no progress bars: a stage reports on its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(path: str | Path, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model with btx's MoE blocks in place, on CPU, in evaluation mode.

    A folder that only btx reads (`btx.btx_folder`) gets its own router; any other MoE model routes by Top-K.

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
            str(path), config=config, revision=revision or "main", dtype=dtype, use_safetensors=True,
            trust_remote_code=False, attn_implementation="sdpa", output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
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

    config, _ = _own_config(path)
    if config is not None:
        return config.to_dict()
    try:
        return AutoConfig.from_pretrained(str(path), revision=revision or "main", trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: this is no model: {error}") from error


def _own_config(path: str | Path) -> tuple[PreTrainedConfig | None, RoutingSettings | None]:
    """Config and router of a folder that only btx reads; None for any other. Broken folders are refused."""
    from transformers import AutoConfig

    folder = Path(path)
    if folder.exists():
        found = check_model_folder(folder)
        if is_btx_folder(found):
            plain, router = open_btx_folder(folder, found)
            values = {key: value for key, value in plain.items() if key != "model_type"}
            return AutoConfig.for_model(plain["model_type"], **values), router
    elif isinstance(path, Path) or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise CheckpointError(f"{path}: there is no such folder")
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
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        rope = config.get("rope_parameters")
        if rope and "rope_theta" in rope:  # transformers 4 reads the older keys alone
            config |= {"rope_theta": rope["rope_theta"], "torch_dtype": config.get("dtype", "float32")}
        write_json(folder / "config.json", config)
        return
    declared = json.loads((like / "config.json").read_text("utf-8"))
    dtype = getattr(torch, str(declared.get("dtype") or declared.get("torch_dtype") or "float32"))
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    copy_beside_weights(like, folder)


def copy_beside_weights(source: Path, target: Path) -> None:
    """Copy config, tokenizer and generation settings of a model folder, overwriting those at the target."""
    for pattern in BESIDE_WEIGHTS:
        for file in sorted(source.glob(pattern)):
            if file.is_dir():
                shutil.copytree(file, target / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, target / file.name)
