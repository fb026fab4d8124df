"""Where the weights of a model in memory lie in the published layout of its class, tensor by tensor.

transformers 5 holds the experts of a MoE layer in fused tensors and some weights under other names than they are
published with; what it knows of that (transformers.core_model_loading) is asked, with tensors that cost nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from btx.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Published(NamedTuple):
    """A published tensor: a whole one in memory, or the rows of one expert."""

    name: str
    of: str
    """The tensor in memory."""
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0
    """Among the expert's rows."""


def weights_in_memory(model: PreTrainedModel) -> dict[str, Tensor]:
    """Name → tensor of all that is saved of a model; of tied weights one, of adapters none."""
    tied = model.all_tied_weights_keys
    return {
        name.replace(".base_layer.", "."): tensor  # as an adapter's layer holds it (`btx.models.adapters`)
        for name, tensor in model.state_dict().items() if name not in tied and ".lora_" not in name
    }  # fmt: skip


def published_tensors(model: PreTrainedModel, folder: Collection[str] | None = None) -> list[Published]:
    """Every published tensor of a model, in the order in which `save_pretrained` goes through them.

    Args:
        folder: names of the tensors of a folder; where these are the names in memory, the layout is that in memory.

    Raises:
        CheckpointError: the class is laid out in a way that is neither.
    """
    from transformers.core_model_loading import revert_weight_conversion

    in_memory = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in sorted(weights_in_memory(model).items(), key=lambda item: _natural(item[0]))
    }
    if folder is not None and in_memory.keys() <= set(folder):
        return [Published(name, name, tuple(tensor.shape)) for name, tensor in in_memory.items()]
    reverted: Mapping[str, Tensor] = revert_weight_conversion(model, dict(in_memory))
    whole = {id(tensor): name for name, tensor in in_memory.items()}
    renamed = {name: whole[id(tensor)] for name, tensor in reverted.items() if id(tensor) in whole}
    rows = _expert_rows(model, {name: in_memory[name] for name in in_memory.keys() - set(renamed.values())})
    if reverted.keys() != renamed.keys() | rows.keys():
        raise _unknown(model, min(reverted.keys() ^ (renamed.keys() | rows.keys())))
    return [
        Published(name, renamed[name], tuple(tensor.shape)) if name in renamed else rows[name]
        for name, tensor in reverted.items()
    ]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _expert_rows(model: PreTrainedModel, fused: Mapping[str, Tensor]) -> dict[str, Published]:
    """Published name → tensor of one expert, for those fused in memory: E experts, R rows, C columns."""
    from transformers.core_model_loading import revert_weight_conversion

    # Every expert is two numbers here, one for each half of its rows: they tell where they went.
    numbers: dict[str, Tensor] = {}
    halves: list[tuple[str, int, int]] = []
    for name, tensor_ERC in fused.items():
        if tensor_ERC.ndim != 3:
            raise _unknown(model, name)
        new = [(name, expert, half) for expert in range(len(tensor_ERC)) for half in (0, 1)]
        numbers[name] = torch.arange(len(halves), len(halves) + len(new)).view(-1, 2, 1)
        halves += new
    pieces = {}
    for published, tensor in revert_weight_conversion(model, numbers).items():
        (name, expert, first), *others = [halves[number] for number in tensor.flatten().tolist()]
        if tensor.ndim != 2 or others not in ([], [(name, expert, 1)]):
            raise _unknown(model, name)
        _, rows, columns = fused[name].shape
        shape = (rows // 2 * (1 + len(others)), columns)
        pieces[published] = Published(published, name, shape, expert, rows // 2 * first)
    return pieces


def _unknown(model: PreTrainedModel, name: str) -> CheckpointError:
    return CheckpointError(f"{type(model).__name__}: several processes cannot share {name}, which the class publishes "
                           f"in a layout of its own; train it in one process (launch.processes: 1)")  # fmt: skip
