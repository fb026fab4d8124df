"""Conversations as tokens: the chat template writes them, and which tokens are answers is found in what it wrote.

A model whose tokenizer has no template gets `PLAIN_TEMPLATE`: words of the text itself mark who speaks, so that no
token has to be added to a vocabulary, and the end-of-text token ends an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from btx.data.conversations import Conversation
from btx.errors import CheckpointError, DataError
from btx.system_errors import blame, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = """\
{{- bos_token if bos_token else eos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- 'Assistant:\\n' }}{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {{- ('System' if message['role'] == 'system' else 'User') + ':\\n' + message['content'] | trim + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:\\n' }}{% endif %}
"""
MARK = "{% generation"
"""Of a template that says itself what answers are."""


@dataclass(frozen=True)
class Encoded:
    """A conversation's tokens, and which of them are learnt."""

    where: str
    ids_N: np.ndarray
    """int64 (N,)."""
    is_answer_N: np.ndarray
    """bool (N,): answers and the ends of their turns."""


def with_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without chat template the plain one; returns whether it did."""
    if getattr(tokenizer, "chat_template", None):
        return False
    tokenizer.chat_template = PLAIN_TEMPLATE
    return True


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, separator: int) -> Encoded:
    """The tokens of a conversation.

    Plain text begins as a document does and ends with the end-of-text token; messages are as the template has them, and
    end where their last answer does: what comes after it is never learnt.

    Args:
        tokenizer: with a chat template, where there are messages.
        separator: token with which documents begin.

    Raises:
        DataError: the template does not take the conversation, or writes its beginning otherwise than the whole.
        CheckpointError: the template marks no answer.
    """
    if not conversation.messages:
        text, start = conversation.prompt + conversation.completion, len(conversation.prompt)
        ids, is_answer = _tokens(tokenizer, text, [(start, len(text))])
        ids, is_answer = [separator, *ids, cast(int, tokenizer.eos_token_id)], [False, *is_answer, True]
    else:
        text = _written(tokenizer, conversation, len(conversation.messages), is_prompt=False)
        ids, is_answer = _marked(tokenizer, conversation) if _marks(tokenizer) else _tokens(
            tokenizer, text, _spans(tokenizer, conversation, text)
        )  # fmt: skip
    learnt = np.array(is_answer, bool)
    if not learnt.any():
        raise DataError(f"{conversation.where}: the chat template leaves no token to learn of this conversation")
    end = int(np.flatnonzero(learnt)[-1]) + 1
    return Encoded(conversation.where, np.array(ids[:end], np.int64), learnt[:end])


def question_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The tokens after which a model answers a user's message.

    Raises:
        DataError: the chat template does not take it.
    """
    asked = Conversation("a question", ({"role": "user", "content": question},))
    return cast(list[int], tokenizer.encode(_written(tokenizer, asked, 1, is_prompt=True), add_special_tokens=False))


def _marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    return MARK in str(tokenizer.chat_template).replace("{%-", "{%")


def _marked(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """Tokens, and the answers that the template marks; those before `learnt_from` are left out by comparing."""
    encoded = cast(Any, tokenizer.apply_chat_template(
        [dict(message) for message in conversation.messages], tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    ))  # fmt: skip
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    turns = [message["role"] == "assistant" for message in conversation.messages]
    starts = [i for i in range(len(mask)) if mask[i] and not (i and mask[i - 1])]
    if not starts:
        raise CheckpointError(
            f"{tokenizer.name_or_path}: its chat template has a generation block and marks no answer of "
            f"{conversation.where} with it; mend the template"
        )
    skipped = sum(turns[: conversation.learnt_from])
    first = starts[skipped] if skipped < len(starts) else len(mask)
    return list(ids), [bool(one) and i >= first for i, one in enumerate(mask)]


def _spans(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, text: str) -> list[tuple[int, int]]:
    """Where the answers are in what the template wrote: what an assistant's message adds to the prompt for it, without
    white space after the end of the turn.

    Raises:
        DataError: the template writes the beginning of the conversation otherwise when more follows.
    """
    spans = []
    for number, message in enumerate(conversation.messages):
        if message["role"] != "assistant" or number < conversation.learnt_from:
            continue
        before = _written(tokenizer, conversation, number, is_prompt=True)
        after = _written(tokenizer, conversation, number + 1, is_prompt=False)
        if not (text.startswith(before) and text.startswith(after.rstrip()) and len(before) < len(after.rstrip())):
            raise DataError(
                f"{conversation.where}: message {number + 1}: the chat template writes the conversation up to this "
                f"answer otherwise when more follows, so the answer cannot be found in it. Use a template with "
                f"{{% generation %}} blocks around answers, or make each answer a line of its own, "
                f'{{"prompt": [...], "completion": [...]}}'
            )
        spans.append((len(before), len(after.rstrip())))
    return spans


def _written(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, count: int, *, is_prompt: bool) -> str:
    """What the template makes of the first messages of a conversation."""
    messages = [dict(message) for message in conversation.messages[:count]]
    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt))
    except Exception as error:  # a template may raise anything
        blame(error)
        raise DataError(f"{conversation.where}: the chat template does not take the conversation: "
                        f"{first_line(error)} ({type(error).__name__})") from error  # fmt: skip


def _tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:  # fmt: skip
    """Token ids of a text, and whether each reaches into one of the spans of characters."""
    encoded = cast(Any, tokenizer(text, add_special_tokens=False, return_offsets_mapping=True))
    is_answer = [any(begin < end and first < end and begin < last for first, last in spans)
                 for begin, end in encoded["offset_mapping"]]  # fmt: skip
    return list(encoded["input_ids"]), is_answer
