"""Texts of tokens, together and one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """The text of some tokens, white space as it is."""
    return cast(str, tokenizer.decode([int(token) for token in ids], clean_up_tokenization_spaces=False))


class TokenTexts:
    """Tokens in, text out: each call gives what one more token adds to the text.

    A character spread over several tokens comes with the last of them. The texts joined, with `rest`, are the decoded
    sequence. Everything is decoded anew for each token, as a token's text may depend on those before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # characters given out so far

    def __call__(self, token: int) -> str:
        self._ids.append(token)
        return self._new(decoded(self._tokenizer, self._ids).rstrip(UNFINISHED))

    def rest(self) -> str:
        """Text of the tokens that still wait for the end of their character."""
        return self._new(decoded(self._tokenizer, self._ids))

    def _new(self, text: str) -> str:
        new = text[self._shown :]
        self._shown += len(new)
        return new


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """Text of each token; joined they are the decoded sequence."""
    stream = TokenTexts(tokenizer)
    texts = [stream(token) for token in ids]
    if texts:
        texts[-1] += stream.rest()
    return texts
