"""Packed rows through a model: the one place where training, evaluation, router fitting and analysis run it.

Shape letters: B batch, S sequence, D model.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn


def packed_hidden(model: nn.Module, input_ids_BS: Tensor, position_ids_BS: Tensor) -> Tensor:
    """Last hidden states (B, S, D) of rows that hold several documents each.

    Attention stops where `position_ids_BS` restart: transformers derives a block-diagonal mask from them, provided
    there is no attention mask and no cache.
    """
    base = cast(Any, model).base_model
    output = base(input_ids=input_ids_BS, position_ids=position_ids_BS, attention_mask=None, use_cache=False)
    return cast(Tensor, output.last_hidden_state)
