"""The held-out text of a run in the tokens of another tokenizer: bits per byte compare across tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from btx.data.held_out import HeldOutDocument
from btx.data.token_files import DocumentEncoder
from btx.data.token_texts import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def in_tokens_of(
    theirs: PreTrainedTokenizerBase, documents: Sequence[HeldOutDocument], ours: PreTrainedTokenizerBase
) -> list[HeldOutDocument]:
    """The same documents in the tokens of another tokenizer.

    Where that gives the text the same tokens, they are left as they are, their separators too: finetuning on
    conversations gives a tokenizer another end-of-text token, and its documents were read with the old one.

    Args:
        ours: the one whose tokens they are.
    """
    encoder = DocumentEncoder(theirs)
    read = []
    for document in documents:
        ids = encoder.beginning(decoded(ours, document.tokens[1:]))
        read.append(HeldOutDocument(np.array(ids, np.int64), document.bytes))
    same = all(np.array_equal(new.tokens[1:], old.tokens[1:]) for new, old in zip(read, documents, strict=True))
    return list(documents) if same else read
