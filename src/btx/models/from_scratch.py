"""Models from scratch. Several processes that share one draw the numbers of all its weights, as one process would, but
module by module, and keep the rows that they are going to hold. So none of them ever has the whole model. It needs that
every module draws its own weights alone, as in all classes of `btx.choices.families`; GPT-2's attention, for one, draws
those of a layer within it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

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

    Raises:
        CheckpointError: transformers cannot build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_transformers()
    try:
        values = {key: value for key, value in config.items() if key != "model_type"}
        built = AutoConfig.for_model(config["model_type"], **(values | overrides))
        with torch.random.fork_rng(devices=[]), _rows_alone() if process_count() > 1 else nullcontext():
            torch.manual_seed(rng_seed)
            model = AutoModelForCausalLM.from_config(built, dtype=torch.float32, attn_implementation="sdpa")
    except Exception as error:
        blame(error)
        raise CheckpointError(f"seed_model.config: transformers cannot build this model: {error}") from error
    return model


def drawn_rows(model: nn.Module) -> dict[str, Tensor]:
    """Name of a weight → the numbers of this process's rows, for a model of `new_model` that is not sharded yet."""
    return {name: getattr(weight, ROWS) for name, weight in model.named_parameters() if hasattr(weight, ROWS)}


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
            drawn = module._parameters[name]
            assert drawn is not None
            setattr(weight, ROWS, _own_rows(drawn))
            module._parameters[name] = weight  # the same one: it may be tied

    def put_on_meta(_: nn.Module, __: str, module: nn.Module | None) -> None:
        for name, weight in getattr(module, "_parameters", {}).items():
            if weight is not None and not weight.is_meta:
                on_meta = nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
                setattr(on_meta, ROWS, _own_rows(weight))
                setattr(module, name, on_meta)

    hook = register_module_module_registration_hook(put_on_meta)
    PreTrainedModel._initialize_weights = initialize_as_a_whole  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = initialize  # type: ignore[method-assign]
        hook.remove()


def _own_rows(weight: Tensor) -> Tensor:
    """A copy of the rows that this process is going to hold."""
    rows = share_of_rows(len(weight), process_number())
    return weight.detach()[rows.start : rows.stop].clone()


def _around_rows(weight: nn.Parameter) -> nn.Parameter:
    """A whole weight with the rows that are known of it; the others are any numbers."""
    rows = share_of_rows(len(weight), process_number())
    around = torch.empty(weight.shape, dtype=weight.dtype)
    around[rows.start : rows.stop] = getattr(weight, ROWS)
    return nn.Parameter(around, requires_grad=weight.requires_grad)
