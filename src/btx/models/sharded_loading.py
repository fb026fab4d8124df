"""One model in several processes: built without numbers, sharded, and then every process gets the rows that it holds,
out of a folder or as they were drawn. So none of them ever has the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from btx.errors import CheckpointError
from btx.model_files.checkpoints import DTYPES
from btx.model_files.headers import Entry, Headers
from btx.model_files.lazy_tensors import OpenFile
from btx.models.configs import own_config, quiet_transformers, read_config
from btx.models.from_scratch import take_drawn_rows
from btx.models.published_layout import published_tensors, weights_in_memory
from btx.models.sharding import first_row, local_rows, shard
from btx.models.whole import check_whole
from btx.moe.layer import set_router, swap_in_moe
from btx.process import quick_imports
from btx.system_errors import blame

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


@quick_imports()
def load_skeleton(folder: Path) -> PreTrainedModel:
    """`btx.models.loading.load_model` without the numbers: weights are on the meta device, buffers are as they are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_transformers()
    config, router = own_config(folder)
    plain = read_config(folder)
    check_whole(folder, plain, loading=True)
    try:
        config = config or AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        config.tie_word_embeddings = plain.get("tie_word_embeddings", False)
        with _weights_on_meta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.generation_config = _generation_settings(folder)
    except Exception as error:
        blame(error)
        raise CheckpointError(f"{folder}: this is no model that can be loaded: {error}") from error
    swap_in_moe(model)
    if router is not None:
        set_router(model, router)
    return model.eval()


def _generation_settings(folder: Path) -> GenerationConfig:
    """Those that a model has whose weights are loaded with it."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def share_out(model: PreTrainedModel, start: Path | None, device: torch.device, *, in_bfloat16: bool = False) -> None:
    """Shard a model whose weights are on the meta device, and give it its numbers: of every weight the rows that this
    process holds, on `device`. Adapters keep those they have.

    Beside them, host memory holds the rows of one tensor at a time.

    Args:
        start: the folder of `load_skeleton`; None for a model of `btx.models.from_scratch`.
        in_bfloat16: as `btx.models.sharding.shard` takes it.

    Raises:
        CheckpointError: a file has become shorter, or several processes cannot share the class.
    """
    drawn = take_drawn_rows(model)
    shard(model, device=device.type, in_bfloat16=in_bfloat16)
    _allocate(model, device)
    if start is not None:
        _read_rows(model, start)
    with torch.no_grad():
        for name in list(drawn):
            local_rows(model.get_parameter(name)).copy_(drawn.pop(name))


def _read_rows(model: PreTrainedModel, folder: Path) -> None:
    headers = Headers(folder)
    weights = weights_in_memory(model)
    with torch.no_grad():
        for piece in published_tensors(model, headers.tensors):
            whole, entry = weights[piece.of], headers.tensors[piece.name]
            target, first = local_rows(whole), first_row(whole)
            if piece.expert is None:
                target.copy_(_rows(entry, first, first + len(target)) if target.ndim else _rows(entry, 0, 1)[0])
            elif first <= piece.expert < first + len(target):
                rows = slice(piece.first_row, piece.first_row + piece.shape[0])
                target[piece.expert - first, rows].copy_(_rows(entry, 0, piece.shape[0]))


def _rows(entry: Entry, start: int, stop: int) -> Tensor:
    """Rows of a tensor in a file."""
    dtype = DTYPES[entry.dtype]
    row = math.prod(entry.shape[1:]) * dtype.itemsize
    data = OpenFile.shared(entry.file).read(entry.start + start * row, (stop - start) * row)
    return data.view(dtype).view(stop - start, *entry.shape[1:])


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Within, modules are built with weights on the meta device and with real buffers: those of positions are computed
    when they are built, and are in no file."""

    def on_meta(_: nn.Module, __: str, weight: nn.Parameter) -> nn.Parameter | None:
        if weight.is_meta:  # it is being tied
            return None
        return nn.Parameter(weight.data.to("meta"), requires_grad=weight.requires_grad)

    hook = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]  # torch forgot what it takes
    try:
        yield
    finally:
        hook.remove()


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Memory for the weights on `device`. Buffers and adapters, which have numbers, move there as they are, and tied
    weights stay one."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    buffers: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, name))
        buffers += [(module, name, buffer.to(device)) for name, buffer in module.named_buffers(recurse=False)]
    numbers = {name: local_rows(p).detach() for name, p in model.named_parameters() if not p.is_meta}
    model.to_empty(device=device)
    for module, name, buffer in buffers:
        setattr(module, name, buffer)
    for (first, its_name), *others in places.values():
        for module, name in others:
            setattr(module, name, getattr(first, its_name))
    with torch.no_grad():
        for name, rows in numbers.items():
            local_rows(model.get_parameter(name)).copy_(rows)
