"""What kind of text a token is: word, number, punctuation and the like. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from btx.data.token_texts import UNFINISHED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLASSES = ("word start", "word part", "number", "punctuation", "code symbol", "space", "line end", "other")
"""word start: letters after a space or at a capital; word part: other letters; other: parts of characters, special
tokens, emoji."""
PUNCTUATION = set(".,;:!?'\"()-–—…‘’“”«»、。，；：！？「」（）")
CODE_SYMBOLS = set("+*/=<>[]{}_#@$%^&|~\\`")
SPACE_MARKS = ("\u2581", "\u0120")
"""How SentencePiece and byte-level tokenizers write a space at the start of a token."""


def token_class(text: str) -> str:
    """One of CLASSES for a token's text, spaces in front included.

    What a token holds most decides: letters before digits before symbols; a token of white space alone is a line end if
    there is one in it.
    """
    bare = text.strip()
    if not bare:
        return "line end" if "\n" in text else "space" if text else "other"
    if UNFINISHED in bare:
        return "other"
    if any(character.isalpha() for character in bare):
        return "word start" if text[0].isspace() or bare[0].isupper() else "word part"
    if any(character.isdigit() for character in bare):
        return "number"
    symbols = sum(character in CODE_SYMBOLS for character in bare)
    if symbols and 2 * symbols >= len(bare):
        return "code symbol"
    return "punctuation" if any(character in PUNCTUATION for character in bare) else "other"


def texts_of_vocabulary(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself, with the space that starts it; "" of special tokens."""
    special, pieces = set(tokenizer.all_special_ids), cast(list[str], tokenizer.convert_ids_to_tokens(list(ids)))
    texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    return [
        "" if token in special
        else f" {text}" if piece.startswith(SPACE_MARKS) and not text[:1].isspace()  # decoders drop the first one
        else text
        for token, piece, text in zip(ids, pieces, texts, strict=True)
    ]  # fmt: skip
