"""Expert models side by side that answer as one: Branch-Train-Merge as `btx.baselines.btm` writes it.

Shape letters: B batch, S sequence, N member models, R scored tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from btx.baselines.text_similarity import WINDOW, TextSimilarity, looks
from btx.data.held_out import Packed
from btx.errors import CheckpointError, UserError
from btx.model_files.model_folder import BTM_FILE
from btx.models.cost import ModelCost, model_cost, side_by_side
from btx.models.outputs import ModelReader, SideBySide, ends_of, token_nll
from btx.models.placement import Place, load_placed
from btx.system_errors import blame

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIMILARITY = "similarity.npz"
ON_CPU = Place()


class BtmModel:
    """The members of a Branch-Train-Merge folder, answering as one (`btx.models.outputs.SideBySide`). It is also called
    like one model of transformers, greedy only: what lm-eval's Hugging Face adapter needs.

    Args:
        members: name → dense model, all with one vocabulary; each where it found room.
        similarity: compares contexts with the members' training text.
        top_k: members mixed for a token.
        window: tokens after which the context is looked at again.
    """

    def __init__(
        self, members: Mapping[str, PreTrainedModel], similarity: TextSimilarity, *, top_k: int, window: int = WINDOW
    ) -> None:
        self.members = dict(members)
        self.similarity, self.top_k, self.window = similarity, top_k, window

    @classmethod
    def load(cls, folder: Path, place: Place = ON_CPU) -> BtmModel:
        """The models of a folder that `write_btm_folder` wrote.

        Raises:
            CheckpointError: no such folder, broken, or a member that is gone or does not fit the others.
        """
        try:
            facts = json.loads((folder / BTM_FILE).read_text("utf-8"))
            paths = {str(name): folder / path for name, path in facts["members"].items()}
            top_k, window, temperature = int(facts["top_k"]), int(facts["window"]), float(facts["temperature"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            blame(error)
            raise CheckpointError(f"{folder / BTM_FILE}: cannot be read ({error!r}); run its stage again") from error
        similarity = TextSimilarity.load(folder / SIMILARITY, list(paths), temperature)
        share = place.shared_by(len(paths))
        members = {name: load_placed(path.resolve(), share) for name, path in paths.items()}
        sizes = {name: cast(Any, member.config).vocab_size for name, member in members.items()}
        if len(set(sizes.values())) > 1:
            raise CheckpointError(f"{folder}: distributions can be mixed over one vocabulary only; there are {sizes}")
        return cls(members, similarity, top_k=top_k, window=window)

    @property
    def device(self) -> torch.device:
        """Where the first member reads tokens, and where all give their scores."""
        return next(iter(self.members.values())).device

    def cost(self) -> ModelCost:
        """All members' parameters; active are those of `top_k` members, the mean one standing for each.

        What is run in excess is not counted: all members for a text's very first token, and reading the context again
        when another member takes over.
        """
        return side_by_side([model_cost(member) for member in self.members.values()], self.top_k)

    def weights(self, rows: Packed) -> Tensor:
        """Weights (B, S, N) with which each position's next token is predicted; 0 in padding."""
        return weights_of(rows, self.similarity, self.top_k, self.window)

    def token_nll(self, rows: Packed) -> Tensor:
        """-ln Σ_i w_i p_i(token) of every scored token, in row order: (R,), float32."""
        weights_BSN, scored_BS = self.weights(rows), rows.scored_BS
        mixed_BS = torch.full(scored_BS.shape, -torch.inf)
        for number, member in enumerate(self.members.values()):
            weights_BS = weights_BSN[..., number]
            wanted_B = ((weights_BS > 0) & scored_BS).any(dim=1)
            if not wanted_B.any():
                continue
            part = rows.select(wanted_B)
            log_probs_BS = torch.full(part.scored_BS.shape, -torch.inf)
            log_probs_BS[part.scored_BS] = -token_nll(member, part).cpu()
            mixed_BS[wanted_B] = torch.logaddexp(mixed_BS[wanted_B], weights_BS[wanted_B].log() + log_probs_BS)
        return -mixed_BS[scored_BS]

    def reader(self) -> BtmReader:
        return BtmReader(self)

    @property
    def config(self) -> Any:
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
        self, input_ids: Tensor, *, max_length: int, attention_mask: Tensor | None = None,
        stopping_criteria: Callable[..., Any] | None = None, pad_token_id: int | None = None,
        do_sample: bool | None = False, **_: Any,
    ) -> Tensor:  # fmt: skip
        """The prompts with their greedy continuations: (B, S + new tokens), as transformers' `generate`.

        Args:
            input_ids: (B, S), padded at the left.
            attention_mask: 0 in padding; None: there is none.
            max_length: tokens in all, at most.
            stopping_criteria: called with all tokens and the scores; all rows have to be stopped.
            pad_token_id: what follows a row's end-of-text token; default: that token.

        Raises:
            UserError: sampling was asked for.
        """
        if do_sample:
            raise UserError("Branch-Train-Merge generates greedily here; set do_sample to false")
        ids_BS = input_ids
        mask_BS = torch.ones_like(ids_BS) if attention_mask is None else attention_mask
        ends = ends_of(next(iter(self.members.values())))
        running_B = torch.ones(len(ids_BS), dtype=torch.bool, device=ids_BS.device)
        reader = self.reader()
        while running_B.any() and ids_BS.shape[1] < max_length:
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


class BtmReader:
    """Reader of a `BtmModel`. The context is first the whole prompt, and again after every `window` new tokens.

    A member that no row needs reads nothing; when one does, it first reads what it missed.
    """

    def __init__(self, model: BtmModel) -> None:
        self._model = model
        self._readers = [ModelReader(member) for member in model.members.values()]
        self._weights_BN: Tensor | None = None
        self._looked = 0  # columns

    @property
    def weights_BN(self) -> Tensor:
        """Weights of the members in the scores that were given last."""
        assert self._weights_BN is not None, "nothing was read yet"
        return self._weights_BN

    @torch.inference_mode()
    def scores(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """ln Σ_i w_i p_i: (B, V), float32."""
        if self._weights_BN is None or ids_BS.shape[1] - self._looked >= self._model.window:
            contexts = [ids_S[mask_S > 0].cpu().numpy() for ids_S, mask_S in zip(ids_BS, mask_BS, strict=True)]
            weights_BN = self._model.similarity.weights(contexts, self._model.top_k)
            self._weights_BN, self._looked = torch.from_numpy(weights_BN).float().to(ids_BS.device), ids_BS.shape[1]
        terms = [
            weights_B.log()[:, None] + reader.scores(ids_BS, mask_BS).float().log_softmax(dim=-1).to(ids_BS.device)
            for reader, weights_B in zip(self._readers, self._weights_BN.T, strict=True)
            if weights_B.any()
        ]
        return torch.stack(terms).logsumexp(dim=0)

    def keep(self, rows_B: Tensor) -> None:
        for reader in self._readers:
            reader.keep(rows_B)
        if self._weights_BN is not None:
            self._weights_BN = self._weights_BN[rows_B]


def weights_of(rows: Packed, similarity: TextSimilarity, top_k: int, window: int) -> Tensor:
    """Weights (B, S, N) with which each position's next token is predicted; 0 in padding.

    They are computed at the positions `btx.baselines.text_similarity.looks` names, from the tokens of the same piece up
    to there, and hold until the next look.
    """
    contexts: list[np.ndarray] = []
    places: list[tuple[int, int, int]] = []  # row, first and last position + 1 that a context decides
    ids_BS, positions_BS = rows.input_ids_BS.numpy(), rows.position_ids_BS.numpy()
    for row, document_ids_S in enumerate(rows.document_ids_BS.numpy()):
        used = int((document_ids_S >= 0).sum())
        starts = np.flatnonzero(positions_BS[row, :used] == 0).tolist()
        for start, end in zip(starts, [*starts[1:], used], strict=True):
            at = looks(end - start, window)
            contexts += [ids_BS[row, start : start + look + 1] for look in at]
            ends = [*(start + look for look in at[1:]), end]
            places += [(row, start + look, until) for look, until in zip(at, ends, strict=True)]
    weights_BSN = torch.zeros(*rows.input_ids_BS.shape, len(similarity.names))
    weights_PN = torch.from_numpy(similarity.weights(contexts, top_k)).float()
    for (row, start, end), weights_N in zip(places, weights_PN, strict=True):
        weights_BSN[row, start:end] = weights_N
    return weights_BSN


def load_model_or_btm(path: str | Path, place: Place = ON_CPU) -> PreTrainedModel | SideBySide:
    """What a model folder, a hub name or a Branch-Train-Merge folder holds, where it is measured."""
    if isinstance(path, Path) and (path / BTM_FILE).is_file():
        return BtmModel.load(path, place)
    return load_placed(path, place)
