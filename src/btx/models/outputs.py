"""What a model says: how likely given tokens are, and the scores of the next ones.

Evaluation, tasks and chat ask these two questions only, so that several models side by side (`btx.baselines.btm_model`)
are measured like a single one.

Shape letters: B batch, S sequence, R scored tokens, D model, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from btx.model_files.beside_weights import listed_ids
from btx.models.cost import ModelCost, model_cost
from btx.models.measuring_memory import LOGITS_AT_ONCE, SCORING
from btx.models.packed import packed_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from btx.data.held_out import Packed

MICRO_BATCH_TOKENS = SCORING.tokens
"""Tokens of a forward pass that measures, at most."""


class Reader(Protocol):
    """Reads a batch of texts that grow at the right, and scores what comes next."""

    def scores(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Logits (B, V) of the token after the last column.

        Args:
            ids_BS: all tokens so far, padded at the left; the columns of the call before, and new ones.
            mask_BS: 1 at tokens, 0 in padding.
        """

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these rows only."""


@runtime_checkable
class SideBySide(Protocol):
    """Several models that answer as one."""

    @property
    def device(self) -> torch.device:
        """Where tokens are read."""

    def token_nll(self, rows: Packed) -> Tensor:
        """As the function `token_nll`."""

    def reader(self) -> Reader:
        """A new reader."""

    def cost(self) -> ModelCost:
        """Parameters in all, and those that a token uses."""


@torch.inference_mode()
def token_nll(model: PreTrainedModel | SideBySide, rows: Packed) -> Tensor:
    """Negative log-likelihood in nats of every scored token, in row order: (R,), float32.

    The head runs on slices of the scored positions, so that logits never exist for all tokens at once.
    """
    if isinstance(model, SideBySide):
        return model.token_nll(rows)
    hidden_BSD = packed_hidden(model, rows.input_ids_BS, rows.position_ids_BS)
    hidden_RD = hidden_BSD[rows.scored_BS.to(hidden_BSD.device)]
    labels_R = rows.labels_BS[rows.scored_BS]
    head = cast(torch.nn.Module, model.get_output_embeddings())
    slices = max(1, LOGITS_AT_ONCE // cast(int, model.config.vocab_size))
    parts = zip(hidden_RD.split(slices), labels_R.split(slices), strict=True)
    return torch.cat([_nll(head(hidden), labels) for hidden, labels in parts])


def _nll(logits_RV: Tensor, labels_R: Tensor) -> Tensor:
    """Where the logits are: a model may have its head on another device than its embedding."""
    return F.cross_entropy(logits_RV.float(), labels_R.to(logits_RV.device), reduction="none")


def open_reader(model: PreTrainedModel | SideBySide) -> Reader:
    """A new reader of any model."""
    return model.reader() if isinstance(model, SideBySide) else ModelReader(model)


def cost_of(model: PreTrainedModel | SideBySide) -> ModelCost:
    """Parameters of any model."""
    return model.cost() if isinstance(model, SideBySide) else model_cost(model)


def ends_of(model: PreTrainedModel | SideBySide) -> list[int]:
    """Tokens at which a model's generation settings end a text: a chat model's turns end with one of its own."""
    return listed_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))


class ModelReader:
    """Reader of one model. Columns it has read stay in its key-value cache; a call may bring any number of new ones."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._begin()

    def _begin(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        # The argument was called past_key_values before transformers 5.24. The cache is filled in place.
        name = "cache" if "cache" in inspect.signature(self._model.forward).parameters else "past_key_values"
        self._arguments = {name: self._cache, "use_cache": True}
        self._read = 0  # columns

    @torch.inference_mode()
    def scores(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        ids_BS, mask_BS = ids_BS.to(self._model.device), mask_BS.to(self._model.device)
        position_ids_BS = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)
        output = cast(Any, self._model)(
            input_ids=ids_BS[:, self._read :], attention_mask=mask_BS, position_ids=position_ids_BS[:, self._read :],
            logits_to_keep=1, **self._arguments,
        )  # fmt: skip
        self._read = ids_BS.shape[1]
        return cast(Tensor, output.logits[:, -1])

    def keep(self, rows_B: Tensor) -> None:
        if not self._read:
            return
        if all(hasattr(layer, "batch_select_indices") for layer in self._cache.layers):
            self._cache.batch_select_indices(rows_B.cpu())  # its layers may be on several devices
        else:
            self._begin()  # states of convolutions and the like cannot be taken apart: all is read again
