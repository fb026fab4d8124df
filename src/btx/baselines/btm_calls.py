"""Models side by side called like one model of transformers, greedy only: what lm-eval's Hugging Face adapter needs.

Shape letters: B batch, S sequence, N member models, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from btx.data.held_out import Packed
from btx.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from btx.models.outputs import Reader


class CalledLikeTransformers:
    """`config`, a forward pass and `generate` for `btx.baselines.btm_model.BtmModel`."""

    members: dict[str, PreTrainedModel]

    def weights(self, rows: Packed) -> Tensor:
        """Weights (B, S, N) with which each position's next token is predicted."""
        raise NotImplementedError

    def reader(self) -> Reader:
        """A new reader."""
        raise NotImplementedError

    @property
    def config(self) -> Any:
        """The config of the first member."""
        return next(iter(self.members.values())).config

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        """`logits` (B, S, V), float32: the logarithms of the mixed distributions.

        Args:
            input_ids: (B, S), padded at the right if at all; what stands there changes nothing before it.
        """
        size, device = input_ids.shape, input_ids.device
        zeros_BS = torch.zeros(size, dtype=torch.long)
        positions_BS = torch.arange(size[1]).expand(size)
        rows = Packed(input_ids.cpu(), zeros_BS, positions_BS, zeros_BS, torch.zeros(1))
        mixed_BSV: Tensor | None = None
        for member, weights_BS in zip(self.members.values(), self.weights(rows).unbind(dim=-1), strict=True):
            if weights_BS.any():
                logits_BSV = cast(Any, member)(input_ids=input_ids.to(member.device), use_cache=False).logits.to(device)
                log_probs_BSV = logits_BSV.float().log_softmax(dim=-1) + weights_BS.to(device).log()[..., None]
                mixed_BSV = log_probs_BSV if mixed_BSV is None else torch.logaddexp(mixed_BSV, log_probs_BSV)
        return SimpleNamespace(logits=mixed_BSV)

    @torch.inference_mode()
    def generate(
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, max_length: int | None = None,
        max_new_tokens: int | None = None, stopping_criteria: Callable[..., Any] | None = None,
        pad_token_id: int | None = None, do_sample: bool | None = False, **_: Any,
    ) -> Tensor:  # fmt: skip
        """The prompts with their greedy continuations: (B, S + new tokens), as transformers' `generate`.

        Args:
            input_ids: (B, S), padded at the left.
            attention_mask: 0 in padding; None: there is none.
            max_length: tokens in all, at most; or `max_new_tokens`, or both.
            stopping_criteria: called with all tokens and the scores; all rows have to be stopped.
            pad_token_id: what follows a row's end-of-text token; default: that token.

        Raises:
            UserError: sampling was asked for.
        """
        if do_sample:
            raise UserError("Branch-Train-Merge generates greedily here; set do_sample to false")
        ids_BS = input_ids
        mask_BS = torch.ones_like(ids_BS) if attention_mask is None else attention_mask
        limits = [limit for limit in (max_length, max_new_tokens and ids_BS.shape[1] + max_new_tokens) if limit]
        ends = self._end_tokens()
        running_B = torch.ones(len(ids_BS), dtype=torch.bool, device=ids_BS.device)
        reader = self.reader()
        while running_B.any() and ids_BS.shape[1] < min(limits):
            scores_BV = reader.scores(ids_BS, mask_BS)
            next_B = scores_BV.argmax(dim=-1)
            if ends:
                filler = ends[0] if pad_token_id is None else pad_token_id
                next_B = torch.where(running_B, next_B, filler)
                running_B &= ~torch.isin(next_B, torch.tensor(ends, device=next_B.device))
            ids_BS = torch.cat([ids_BS, next_B[:, None]], dim=1)
            mask_BS = torch.cat([mask_BS, torch.ones_like(next_B)[:, None]], dim=1)
            if stopping_criteria is not None and bool(torch.as_tensor(stopping_criteria(ids_BS, scores_BV)).all()):
                break
        return ids_BS

    def _end_tokens(self) -> list[int]:
        ends = next(iter(self.members.values())).generation_config.eos_token_id
        return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]
