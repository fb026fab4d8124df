"""One model on several processes: FSDP2 gives each a share of the rows of every weight (torch.distributed.fsdp,
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")
ROOT_CALL = "call_as_forward"
"""Attribute of a sharded model: a forward of its root that runs any function."""


def process_count() -> int:
    """How many processes hold the models of this one together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_number() -> int:
    """Number of this process among them."""
    return distributed.get_rank() if process_count() > 1 else 0


def shard(model: nn.Module, *, device: str = "cpu", in_bfloat16: bool = False) -> None:
    """Spread `model` over all processes: one unit a decoder layer, what is left (embeddings, last norm, head) the
    root's. Gradients are added up over the processes after every backward pass, each keeping the sum of its rows.

    Args:
        in_bfloat16: layers put their weights together in bfloat16, from float32 shares, and gradients are added up in
            float32: what autocast makes of one process's weights. The root's stay in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device, (process_count(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if in_bfloat16 else None, reduce_dtype=torch.float32 if in_bfloat16 else None,
        cast_forward_inputs=False,
    )  # fmt: skip
    for layer in cast(Any, model).base_model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all processes already
            unit.set_force_sum_reduction_for_comms(True)
    setattr(model, ROOT_CALL, types.MethodType(lambda self, compute: compute(), model))
    register_fsdp_forward_method(model, ROOT_CALL)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has spread it already."""
    return hasattr(model, ROOT_CALL)


def as_forward(model: nn.Module, compute: Callable[[], T]) -> T:
    """What `compute` gives, with the weights of a sharded model's root put together as in its forward: for a loss that
    takes the head's weight itself. What goes in stays on the host, where FSDP2 would move a forward's arguments."""
    call = getattr(model, ROOT_CALL, None)
    return compute() if call is None else cast(T, call(compute))


def local_rows(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds: all of them unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor, number: int) -> range:
    """Numbers of the rows that process `number` holds; all unless it is sharded."""
    return share_of_rows(len(tensor), number) if isinstance(tensor, DTensor) else range(len(tensor))


def share_of_rows(rows: int, number: int) -> range:
    """Numbers of the rows that process `number` gets of so many. FSDP2 cuts as torch.chunk does."""
    per_process = -(-rows // process_count())
    return range(min(rows, per_process * number), min(rows, per_process * (number + 1)))


def first_row(tensor: Tensor) -> int:
    """Number of the first of `local_rows`."""
    return rows_of(tensor, process_number()).start if isinstance(tensor, DTensor) else 0


def as_rows_of(rows: Tensor, tensor: Tensor) -> Tensor:
    """A tensor sharded as `tensor` is, of which this process holds `rows`; `rows` themselves if it is not sharded."""
    if not isinstance(tensor, DTensor):
        return rows
    return DTensor.from_local(
        rows, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all processes, each of which has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def added_up(values: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if process_count() > 1:
        distributed.all_reduce(values)
    return values


def largest(value: int) -> int:
    """Of a number that each process has, the largest; on the host."""
    if process_count() == 1:
        return value
    values = torch.tensor(value)
    distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return int(values)


def same_everywhere(value: Any) -> Any:
    """What the first process has, a JSON value, on all of them."""
    if process_count() == 1:
        return value
    told = [value]
    distributed.broadcast_object_list(told, device=torch.device("cpu"))
    return told[0]


def from_all(value: Any) -> list[Any]:
    """What every process has, a JSON value each, in order, on all of them."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    distributed.all_gather_object(values, value)
    return values
