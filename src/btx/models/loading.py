"""Loading models and tokenizers: folders or hub names, safetensors only, no code from the model's folder.

This is the one place where torch models are read; every stage gets its weights here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from btx.choices.families.configs import with_dtype, with_rope
from btx.data.tokenizer import save_tokenizer
from btx.errors import CheckpointError
from btx.files import write_json
from btx.model_files.beside_weights import copy_beside_weights, write_generation_config
from btx.model_files.btx_folder import FILE
from btx.model_files.checkpoints import DTYPES
from btx.model_files.headers import Headers, check_unquantised, main_type
from btx.model_files.hub import local_model
from btx.model_files.token_ids import read_object
from btx.model_files.vocabularies import check_ids, missing_packages
from btx.models.configs import as_the_files_say, own_config, quiet_transformers, read_config
from btx.models.sharded_saving import stream_model
from btx.models.sharding import process_count, process_number
from btx.models.whole import FAMILY_CLASSES, check_whole
from btx.moe.layer import set_router, swap_in_moe
from btx.process import quick_imports
from btx.system_errors import blame

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@quick_imports()
def load_model(
    path: str | Path, *, revision: str | None = None, dtype: torch.dtype = torch.float32,
    max_memory: Mapping[int | str, int] | None = None, offload_folder: Path | None = None,
) -> PreTrainedModel:  # fmt: skip
    """A causal language model with btx's MoE blocks in place, in evaluation mode; on CPU, unless `max_memory` is given.

    A folder that only btx reads (`btx.model_files.btx_folder`) has its own router; other MoE models route by Top-K.

    Args:
        path: folder as `save_pretrained` writes it, or a hub name (`hf:ORG/NAME@REVISION`, ORG/NAME).
        revision: git revision of a hub name.
        dtype: type of the weights in memory.
        max_memory: bytes of weights by device (number of a GPU, or cpu): accelerate spreads the layers over them, the
            rest stays on disk. `btx.models.placement` knows what there is.
        offload_folder: where weights on disk are written if the model's files do not hold them as they are needed.

    Raises:
        CheckpointError: no such model, pickled or quantised weights, unknown class, tensors that do not fit.
    """
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    path = local_model(path)
    spread: dict[str, Any] = {}
    if max_memory is not None:
        spread = {"device_map": "auto", "max_memory": dict(max_memory), "offload_folder": offload_folder}
    config, router = own_config(path)
    if Path(path).is_dir() and (plain := read_config(path))["model_type"] in FAMILY_CLASSES:
        check_whole(Path(path), plain, loading=True)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            revision=revision or "main",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **spread,
        )
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        blame(error)
        raise CheckpointError(f"{path}: this is no model that can be loaded: {error}") from error
    model: PreTrainedModel = loaded[0]
    check_unquantised(Path(path), model.config.to_dict())  # a hub name; folders were looked at before
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, loaded[1].get(kind) or ())) for kind in kinds}
    if any(wrong.values()):
        misfits = "; ".join(
            f"{kind.replace('_', ' ')}: {', '.join(names[:5])}" for kind, names in wrong.items() if names
        )
        raise CheckpointError(f"{path}: the tensors do not fit the config's class {type(model).__name__}: {misfits}")
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
        CheckpointError: there is none, a package that would load it is missing, it has no end-of-text token, or ids
            beyond the embedding of the model beside it.
    """
    from transformers import AutoTokenizer

    quiet_transformers()
    path = local_model(path)
    if isinstance(path, Path) and not path.exists():
        raise CheckpointError(f"{path}: there is no such folder")
    if (missing := missing_packages(Path(path))) is not None:
        raise CheckpointError(missing)
    plain = own_config(path)[0] if (Path(path) / FILE).exists() else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), config=plain, revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        blame(error)
        raise CheckpointError(f"{path}: this folder has no tokenizer that can be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{path}: the tokenizer has no end-of-text token (eos_token); set one before branching")
    if (config := Path(path) / "config.json").is_file() and (rows := read_object(config).get("vocab_size")):
        check_ids(Path(path), int(rows), tokenizer.get_vocab())
    return tokenizer


def save_model(model: PreTrainedModel, folder: Path, *, like: Path | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a model folder that any engine reads, in the published layout, without btx. Of several processes that share
    the model all have to call it, and the first one writes what one process would write.

    Args:
        like: folder of the model this one was trained from; its config, tokenizer and generation settings are kept as
            they are, and every weight gets the type that it has there. None for a model from scratch.
        tokenizer: written when there is no `like`.
    """
    if like is None:
        _save_weights(model, folder, {}, None)
    else:
        headers = Headers(like)
        types = {name: DTYPES[entry.dtype] for name, entry in headers.tensors.items() if entry.dtype in DTYPES}
        main: torch.dtype = getattr(torch, main_type(headers))
        _save_weights(model, folder, {name: types.get(name, main) for name in model.state_dict()}, headers.tensors)
    if process_number() == 0:
        _save_beside_weights(folder, like, tokenizer)


def _save_weights(
    model: PreTrainedModel, folder: Path, types: Mapping[str, torch.dtype], layout: Collection[str] | None
) -> None:
    """Weights, each in its type in `types` or else as it is, and what `save_pretrained` writes beside them."""
    if process_count() > 1:
        stream_model(model, folder, types, layout)
        return
    state: dict[str, torch.Tensor] = {}
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in model.state_dict().items():
        # Tied weights stay one tensor, or transformers would write each of them.
        same = first.setdefault((tensor.data_ptr(), tensor.shape), name) if tensor.numel() else name
        state[name] = state[same] if same in state else tensor.to(types.get(name, tensor.dtype))
    model.save_pretrained(folder, state_dict=state)


def _save_beside_weights(folder: Path, like: Path | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """The rest of a model folder; arguments as `save_model`."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if like is None:
        save_tokenizer(tokenizer, folder)
        rope = config.get("rope_parameters")
        if rope and "rope_theta" in rope:
            config = with_rope(config, rope)
        write_json(folder / "config.json", with_dtype(config, str(config.get("dtype") or "float32")))
        write_generation_config(folder, config)
        return
    copy_beside_weights(like, folder)
    declared = json.loads((folder / "config.json").read_text("utf-8"))
    if (true := as_the_files_say(declared, folder)) != declared:
        write_json(folder / "config.json", true)
