"""Completions token by token, each with the experts that read it.

Shape letters: B batch, S sequence, T tokens, V vocabulary, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from btx.baselines.btm_model import BtmReader
from btx.data.token_texts import TokenTexts
from btx.models.outputs import SideBySide, ends_of, open_reader
from btx.moe.any_moe import only_experts, watched
from btx.moe.balancing import sparse_gates
from btx.moe.routers import Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ShownToken:
    """A token of the prompt or the completion, ready to print."""

    text: str
    pair: tuple[int, ...]
    """The two experts with the most gate weight over all layers, ascending; empty for a dense model."""
    from_prompt: bool
    token_id: int | None = None
    """None for text that is left over at the end: characters that are cut off."""
    gates_LE: tuple[tuple[float, ...], ...] = ()
    """Gate weight of every expert in every layer; of Branch-Train-Merge one layer, the models' weights."""


def pick(temperature: float, random: torch.Generator, top_p: float = 1.0) -> Callable[[Tensor], int]:
    """How the next token is chosen from its logits (V,): the likeliest at temperature 0, else by chance among the
    likeliest whose probabilities add up to `top_p` (nucleus sampling, arXiv 1904.09751)."""
    if temperature == 0:
        return lambda logits_V: int(logits_V.argmax())

    def sampled(logits_V: Tensor) -> int:
        logits_V = logits_V.double().cpu()
        # The largest is 0 first: divided by next to nothing it would be infinite.
        probs_V, ids_V = ((logits_V - logits_V.max()) / temperature).float().softmax(dim=-1), None
        if top_p < 1:
            probs_V, ids_V = probs_V.sort(descending=True)
            probs_V = probs_V * (probs_V.cumsum(0) - probs_V < top_p)
        place = int(torch.multinomial(probs_V, 1, generator=random))
        return place if ids_V is None else int(ids_V[place])

    return sampled


@torch.inference_mode()
def complete_token_by_token(
    model: PreTrainedModel | SideBySide, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int],
    max_new_tokens: int, choose: Callable[[Tensor], int], *, allowed_E: Tensor | None = None,
    turn: AbstractContextManager[Any] | None = None,
) -> Iterator[ShownToken]:  # fmt: skip
    """The prompt's tokens, but for a separator at its start, then the completion's, each as soon as its experts are
    known.

    Experts are those that read the token, so a new token comes with the forward pass after the one that chose it. Of
    Branch-Train-Merge they are the two models with the most weight in what follows the token.

    Args:
        allowed_E: experts that may be used, of a model with experts in its layers; None: all.
        turn: held in each forward pass, so that several completions of one model take turns.
    """
    texts, reader, turn = TokenTexts(tokenizer), open_reader(model), turn or nullcontext()
    new_ids, ids_1S = list(prompt), torch.empty(1, 0, dtype=torch.long, device=model.device)
    ends = {tokenizer.eos_token_id, *ends_of(model)}
    shown, separators = 0, {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for made in range(max_new_tokens + 1):
        ids_1S = torch.cat([ids_1S, torch.tensor([new_ids], device=model.device)], dim=1)
        if isinstance(reader, BtmReader):
            with turn:
                scores_V = reader.scores(ids_1S, torch.ones_like(ids_1S))[0]
                gates_TLE = reader.weights_BN[None].expand(len(new_ids), -1, -1)
        else:
            with turn, only_experts(cast(nn.Module, model), allowed_E), watched(cast(nn.Module, model)) as routings:
                scores_V = reader.scores(ids_1S, torch.ones_like(ids_1S))[0]
            gates_TLE = gates_of(routings, len(new_ids))
        gates, pairs = gates_TLE.tolist(), top_pairs(gates_TLE)
        for token, gates_LE, pair in zip(new_ids, gates, pairs, strict=True):
            if shown or token not in separators:
                yield ShownToken(texts(token), pair, shown < len(prompt), token, tuple(map(tuple, gates_LE)))
            shown += 1
        token = choose(scores_V)
        if made == max_new_tokens or token in ends:
            break
        new_ids = [token]
    if rest := texts.rest():
        yield ShownToken(rest, (), from_prompt=shown <= len(prompt))


def gates_of(routings: Sequence[Routing], tokens: int) -> Tensor:
    """Gate weight of every expert in every layer, for the tokens of a forward pass: (T, L, E); (T, 0, 0) of a dense
    model."""
    if not routings:
        return torch.empty(tokens, 0, 0)
    return torch.stack([sparse_gates(routing).cpu() for routing in routings], dim=1)


def top_pairs(gates_TLE: Tensor) -> list[tuple[int, ...]]:
    """For each token the two experts with the most gate weight over all layers, ascending; one where no other has
    any."""
    if not gates_TLE.numel():
        return [()] * len(gates_TLE)
    gates_TE = gates_TLE.sum(dim=1)
    weights_T2, experts_T2 = gates_TE.topk(min(2, gates_TE.shape[1]), dim=-1)
    return [
        tuple(sorted(expert for weight, expert in zip(weights_2, experts_2, strict=True) if weight > 0))
        for weights_2, experts_2 in zip(weights_T2.tolist(), experts_T2.tolist(), strict=True)
    ]


def until_stop(tokens: Iterator[ShownToken], stops: Sequence[str]) -> Generator[ShownToken, None, bool]:
    """The tokens up to the first of some strings in the completion, which is left out; a token that may be the start of
    one is held back until it is known. Returns whether one was met."""
    held: list[ShownToken] = []
    for token in tokens:
        if token.from_prompt or not stops:
            yield token
            continue
        held.append(token)
        text = "".join(each.text for each in held)
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        if places:
            yield from _cut(held, min(places))
            return True
        begun = max((_begun(stop, text) for stop in stops), default=0)
        while held and len(text) - len(held[0].text) >= begun:
            text = text[len(held[0].text) :]
            yield held.pop(0)
    yield from held
    return False


def _begun(stop: str, text: str) -> int:
    """Characters at the end of a text with which a string begins that may follow whole."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _cut(tokens: Sequence[ShownToken], length: int) -> Iterator[ShownToken]:
    """Tokens that make up the first `length` characters, the last one cut off."""
    for token in tokens:
        if length <= 0:
            return
        yield replace(token, text=token.text[:length])
        length -= len(token.text)
