"""The type of the output's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from btx.choices.families.configs import Config, with_dtype
from btx.errors import UserError
from btx.model_files.lazy_tensors import cast
from btx.model_files.shard_writer import OutputTensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str | None) -> torch.dtype | None:
    """The type with this name, None for None; raises UserError for another name."""
    if name is None:
        return None
    if name not in DTYPES:
        raise UserError(f"dtype {name!r}: allowed are {', '.join(DTYPES)}")
    return DTYPES[name]


def in_one_type(
    tensors: Sequence[OutputTensor], config: Config, dtype: torch.dtype | None
) -> tuple[list[OutputTensor], Config]:
    """All floating-point weights in `dtype`, and the config that says so; for None each keeps its type.

    The config then names the type of most weights, whatever it said before.
    """
    counts: Counter[torch.dtype] = Counter()
    result = []
    for tensor in tensors:
        kept = tensor
        if dtype is not None and tensor.dtype.is_floating_point:
            kept = replace(tensor, dtype=dtype, parts=[cast(part, dtype) for part in tensor.parts])
        counts[kept.dtype] += kept.nbytes // kept.dtype.itemsize
        result.append(kept)
    most = counts.most_common(1)[0][0] if counts else torch.float32
    return result, with_dtype(config, str(most).removeprefix("torch."))
