"""The tensors of the MoE model in the published layout, planned from those of the dense models; nothing is read here.

Layer by layer: the experts, the router, the inert tensors that the MoE class wants; then the shared weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from btx.choices.families import Config, Family
from btx.mixing.inputs import MixInputs
from btx.mixing.merge import Merge
from btx.model_files.lazy_tensors import Computed, Elementwise, FileTensor, LazyTensor, cast, filled
from btx.model_files.shard_writer import OutputTensor


@dataclass(frozen=True)
class Expert:
    """One expert of one layer: a dense model's FF sublayer, or what a transformation made of some."""

    name: str
    """The expert model it comes from; of a part, with the part: `math/0`."""
    gate: LazyTensor
    """(F, D)"""
    up: LazyTensor
    """(F, D)"""
    down: LazyTensor
    """(D, F)"""
    origin: Mapping[str, Any]
    """What it came from, for the record."""


ExpertsTransform = Callable[[list[Expert]], list[Expert]]
"""The experts of a layer → the experts of its MoE layer: splitting, blending, copies. Same number in every layer."""


def experts_of_layer(inputs: MixInputs, layer: int) -> list[Expert]:
    """The FF sublayers of all members, as they are."""
    names = {role: pattern.format(layer=layer) for role, pattern in inputs.family.feed_forward.items()}
    return [
        Expert(member, **{role: folder[name] for role, name in names.items()}, origin={"from": "copy", "of": member})
        for member, folder in inputs.members.items()
    ]


def expert_tensors(family: Family, layer: int, experts: Sequence[Expert], dtype: torch.dtype) -> Iterator[OutputTensor]:
    """The experts of one layer under their published names."""
    for pattern, roles in family.experts.items():
        made_from = {"tensors": [family.feed_forward[role].format(layer=layer) for role in roles]}
        parts = [[cast(getattr(expert, role), dtype) for role in roles] for expert in experts]
        rows, columns = sum(part.shape[0] for part in parts[0]), parts[0][0].shape[1]
        if "{expert}" in pattern:
            for number, (expert, parts_of_expert) in enumerate(zip(experts, parts, strict=True)):
                origin = {**expert.origin, **made_from}
                yield OutputTensor(
                    pattern.format(layer=layer, expert=number), (rows, columns), dtype, parts_of_expert, origin
                )
        else:
            origin = {"from": "stack", "experts": [dict(expert.origin) for expert in experts], **made_from}
            stacked = [part for parts_of_expert in parts for part in parts_of_expert]
            yield OutputTensor(pattern.format(layer=layer), (len(experts), rows, columns), dtype, stacked, origin)


def inert_tensors(family: Family, layer: int, config: Config, dtype: torch.dtype) -> Iterator[OutputTensor]:
    """What the MoE class has and the dense class lacks, so that it adds nothing."""
    for pattern, (shape, value) in family.inert(config).items():
        origin = {"from": "filled", "value": value}
        yield OutputTensor(pattern.format(layer=layer), shape, dtype, [filled(shape, dtype, value)], origin)


def shared_tensor(
    name: str, values: Sequence[FileTensor], start: FileTensor, merge: Merge, dtype: torch.dtype, origin: dict[str, Any]
) -> OutputTensor:
    """One shared weight, merged."""
    merged: LazyTensor
    if merge.elementwise:
        merged = Elementwise(
            start.shape, dtype, [*values, start],
            lambda blocks: merge.function(blocks[:-1], blocks[-1], name),
        )  # fmt: skip
    else:
        merged = Computed(
            start.shape, dtype, lambda: merge.function([value.load() for value in values], start.load(), name)
        )
    return OutputTensor(name, start.shape, dtype, [merged], {"from": merge.name, **origin})


def fused_again(inputs: MixInputs, tensors: Sequence[OutputTensor]) -> list[OutputTensor]:
    """The tensors of a dense model under the names of its class: parts of fused tensors laid together again."""
    by_name = {tensor.name: tensor for tensor in tensors}
    for layer in range(inputs.num_layers):
        for fused, parts in inputs.family.fused(inputs.config).items():
            apart = [by_name.pop(part.format(layer=layer)) for part in parts]
            name, rows = fused.format(layer=layer), sum(part.shape[0] for part in apart)
            laid = [lazy for part in apart for lazy in part.parts]
            by_name[name] = OutputTensor(name, (rows, *apart[0].shape[1:]), apart[0].dtype, laid, apart[0].origin)
    return list(by_name.values())
