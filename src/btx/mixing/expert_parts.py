"""The paper's variants of what an expert is (section 4.3): split and blend. Nothing is read here.

An FF sublayer is a sum over its F inner units, so it can be cut into C chunks of F/C units whose outputs add up to its
own: FF(x) = Σ_c FF_c(x). Rows of `gate` and `up` and columns of `down` are cut alike.

Split: every chunk is an expert, N·C in all. Gates sum to 1, so with equal gates over all chunks of equal experts the
layer puts out Σ FF_c(x) / C = FF(x) / C: it shrinks. With rescaling every chunk's `down` is multiplied by C, which
makes that sum exactly FF(x), and keeps the expected size of the output for any top-k.

Blend: with C = N, expert n is made of the n-th chunk of every member, N experts of width F again. Equal gates over all
of them give the mean of the members' FF outputs, so nothing needs rescaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from btx.errors import CheckpointError
from btx.mixing.moe_layout import Expert, ExpertsTransform
from btx.model_files.lazy_tensors import Computed, LazyTensor


def experts_transform(*, split: int = 1, rescale: bool = True, blend: bool = False) -> ExpertsTransform:
    """What makes the experts of a MoE layer from the members' FF sublayers.

    Args:
        split: chunks C every FF sublayer is cut into; 1 leaves it whole.
        rescale: with split, multiply every chunk's output by C.
        blend: recombine the chunks of all members.

    Raises:
        CheckpointError: both at once, or (from the result) an FF size that the number of chunks does not divide.
    """
    if split < 1:
        raise CheckpointError(f"split is {split}; allowed: 1 (whole experts) or more")
    if blend and split > 1:
        raise CheckpointError("split and blend exclude each other: blend cuts every FF into as many chunks as experts")
    if blend:
        return blended
    if split == 1:
        return list
    return lambda experts: [part for expert in experts for part in chunks(expert, split, rescale=rescale)]


def chunks(expert: Expert, count: int, *, rescale: bool) -> list[Expert]:
    """The chunks of one expert, named after it: `math/0`, `math/1`, ..."""
    width = expert.gate.shape[0]
    if width % count:
        raise CheckpointError(
            f"the FF sublayers have {width} inner units, which {count} does not divide: they cannot be cut into "
            f"{count} equal chunks"
        )
    size = width // count
    factor = float(count) if rescale else 1.0
    return [
        replace(
            expert,
            name=f"{expert.name}/{number}",
            gate=expert.gate.rows(number * size, (number + 1) * size),
            up=expert.up.rows(number * size, (number + 1) * size),
            down=_columns(expert.down, number * size, (number + 1) * size, factor),
            origin={**expert.origin, "from": "split", "chunk": number, "of_chunks": count, "factor": factor},
        )
        for number in range(count)
    ]


def blended(experts: Sequence[Expert]) -> list[Expert]:
    """Expert n: the n-th chunk of every expert."""
    cut = [chunks(expert, len(experts), rescale=False) for expert in experts]
    return [
        Expert(
            name=f"blend/{number}",
            gate=_stacked([part.gate for part in parts], dim=0),
            up=_stacked([part.up for part in parts], dim=0),
            down=_stacked([part.down for part in parts], dim=1),
            origin={"from": "blend", "of": [expert.name for expert in experts], "chunk": number},
        )
        for number, parts in enumerate(zip(*cut, strict=True))
    ]


def _columns(tensor: LazyTensor, start: int, stop: int, factor: float) -> Computed:
    rows = tensor.shape[0]
    return Computed((rows, stop - start), tensor.dtype, lambda: tensor.load()[:, start:stop].double() * factor)


def _stacked(parts: Sequence[LazyTensor], dim: int) -> Computed:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return Computed(tuple(shape), parts[0].dtype, lambda: torch.cat([part.load() for part in parts], dim=dim))
