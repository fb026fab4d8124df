"""One model on several processes: FSDP2 gives each a share of the rows of every weight (torch.distributed.fsdp,
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor


def process_count() -> int:
    """How many processes hold the models of this one together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_number() -> int:
    """Number of this process among them."""
    return distributed.get_rank() if process_count() > 1 else 0


def shard(
    model: nn.Module, *, reshard: bool = False, policy: Any = None, device: torch.device | None = None
) -> None:  # fmt: skip
    """Spread `model` over all processes: one unit a decoder layer, what is left (embeddings, last norm, head) the
    root's.

    Args:
        reshard: give the other processes' rows back after a layer's forward; less memory, more traffic.
        policy: a MixedPrecisionPolicy; None computes in the weights' type.
        device: where `model` will be, for one on the meta device (`btx.models.sharded_loading`).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh((device or next(model.parameters()).device).type, (process_count(),))
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    for layer in cast(Any, model).base_model.layers:
        fully_shard(layer, reshard_after_forward=reshard, **options)
    fully_shard(model, reshard_after_forward=False, **options)


def local_rows(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds: all of them unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor, number: int) -> range:
    """Numbers of the rows that process `number` holds; all unless it is sharded. FSDP2 cuts as torch.chunk does."""
    if not isinstance(tensor, DTensor):
        return range(len(tensor))
    per_process = -(-len(tensor) // tensor.device_mesh.size())
    return range(min(len(tensor), per_process * number), min(len(tensor), per_process * (number + 1)))


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


def same_everywhere(value: Any) -> Any:
    """What the first process has, a JSON value, on all of them."""
    if process_count() == 1:
        return value
    told = [value]
    distributed.broadcast_object_list(told, device=torch.device("cpu") if distributed.get_backend() == "gloo" else None)
    return told[0]


def from_all(value: Any) -> list[Any]:
    """What every process has, a JSON value each, in order, on all of them."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    distributed.all_gather_object(values, value)
    return values
