"""Models from scratch. Several processes that share one draw the numbers of all its weights, as one process would, but
module by module, and keep the rows that they are going to hold. So none of them ever has the whole model. It needs that
every module draws its own weights alone, as in all classes of `btx.choices.families`; GPT-2's attention, for one, draws
those of a layer within it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from btx.errors import CheckpointError
from btx.models.configs import quiet_transformers
from btx.models.sharding import process_count, process_number, share_of_rows
from btx.process import quick_imports
from btx.system_errors import blame

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = "drawn_rows"
"""Attribute of a weight on the meta device: the numbers of the rows that this process is going to hold."""


@quick_imports()
def new_model(config: dict[str, Any], *, rng_seed: int, **overrides: Any) -> PreTrainedModel:
    """A model from scratch, float32, initialised from `rng_seed` alone. Where several processes share it, its weights
    are on the meta device until `btx.models.sharded_loading.share_out` gives each process its rows.

    Args:
        config: `model_type` and what its transformers config class takes.
        overrides: config values that the tokenizer decides (vocab_size, bos_token_id, ...).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_transformers()
    try:
        built = AutoConfig.for_model(**(config | overrides))
        with torch.random.fork_rng(devices=[]), _rows_alone() if process_count() > 1 else nullcontext():
            torch.manual_seed(rng_seed)
            model = AutoModelForCausalLM.from_config(built, dtype=torch.float32, attn_implementation="sdpa")
    except Exception as error:
        blame(error)
        raise CheckpointError(f"seed_model.config: transformers cannot build this model: {error}") from error
    return model


def take_drawn_rows(model: nn.Module) -> dict[str, Tensor]:
    """Name of a weight → the numbers of this process's rows, out of a model of `new_model` that is not sharded yet. The
    model no longer has them."""
    return {name: vars(weight).pop(ROWS) for name, weight in model.named_parameters() if hasattr(weight, ROWS)}


@contextmanager
def _rows_alone() -> Iterator[None]:
    """Within, of every module that becomes part of a model this process keeps its rows of the weights. Modules draw
    numbers when they are built, and transformers draws others over them: each time one module is there as a whole."""
    from transformers import PreTrainedModel

    initialize = PreTrainedModel._initialize_weights

    def initialize_as_a_whole(self: PreTrainedModel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        on_meta = {name: weight for name, weight in module._parameters.items() if weight is not None and weight.is_meta}
        for name, weight in on_meta.items():
            module._parameters[name] = _around_rows(weight)
        initialize(self, module, *args, **kwargs)
        for name, weight in on_meta.items():
            setattr(weight, ROWS, _own_rows(getattr(module, name)))
            module._parameters[name] = weight  # the same one: it may be tied

    def off_the_heap(_: nn.Module, __: str, weight: nn.Parameter) -> nn.Parameter:
        return weight if weight.is_meta else _like(weight, _apart(weight.shape, weight.dtype).copy_(weight.detach()))

    def put_on_meta(_: nn.Module, __: str, module: nn.Module | None) -> None:
        for name, weight in getattr(module, "_parameters", {}).items():
            if weight is not None and not weight.is_meta:
                on_meta = _like(weight, weight.detach().to("meta"))
                setattr(on_meta, ROWS, _own_rows(weight))
                setattr(module, name, on_meta)

    hooks = [
        register_module_parameter_registration_hook(off_the_heap),  # type: ignore[arg-type]  # torch forgot its result
        register_module_module_registration_hook(put_on_meta),
    ]
    PreTrainedModel._initialize_weights = initialize_as_a_whole  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = initialize  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()


def _own_rows(weight: Tensor) -> Tensor:
    """A copy of the rows that this process is going to hold."""
    held = share_of_rows(len(weight), process_number())
    rows = weight.detach()[held.start : held.stop]
    return _apart(rows.shape, rows.dtype).copy_(rows)


def _around_rows(weight: nn.Parameter) -> nn.Parameter:
    """A whole weight with the rows that are known of it; the others are any numbers."""
    held = share_of_rows(len(weight), process_number())
    around = _apart(weight.shape, weight.dtype)
    around[held.start : held.stop] = getattr(weight, ROWS)
    return _like(weight, around)


def _like(weight: nn.Parameter, numbers: Tensor) -> nn.Parameter:
    return nn.Parameter(numbers, requires_grad=weight.requires_grad)


def _apart(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory of its own, which goes back to the system with the tensor. On the heap each weight leaves a hole that the
    next one does not fit into, and the heap grows as large as the model."""
    size = shape.numel() * dtype.itemsize
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size].view(dtype).view(shape)
