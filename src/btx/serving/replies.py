"""What `btx serve` replies, as OpenAI's interface has it, and `routing` besides: token by token the gate weight of
every expert in every layer. Plain Python.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any

from btx.serving.requests import Refused

if TYPE_CHECKING:
    from btx.serving.completing import ShownToken
    from btx.serving.speaker import Answer

DECIMALS = 3
"""Of gate weights."""


@dataclass
class Reply:
    """One reply under way."""

    chat: bool
    """Whether messages were asked for, or a text."""
    model: str
    experts: Sequence[str]
    routing: bool
    answer: Answer
    closing: Event
    """Set when the server ends."""
    with_usage: bool = False
    """Whether the stream's last piece tells the number of tokens."""
    is_left: bool = False
    """Set when nobody reads it any more."""
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self) -> dict[str, Any]:
        """The reply, once the answer has come to its end; raises Refused if that is cut short."""
        tokens = [token for token in self._tokens() if self.routing or not token.from_prompt]
        text = "".join(token.text for token in tokens if not token.from_prompt)
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "finish_reason": self.answer.finish_reason, "logprobs": None}
        if self.routing:
            choice["routing"] = self._routing(tokens)
        return self._head("") | {"choices": [choice], "usage": self._usage()}

    def stream(self) -> Iterator[bytes]:
        """The reply in pieces, as server-sent events."""
        if self.chat:
            yield _event(self._piece({"role": "assistant", "content": ""}))
        for token in self._tokens():
            if token.from_prompt and not self.routing:
                continue
            piece = self._piece({"content": token.text} if self.chat else token.text, hidden=token.from_prompt)
            if self.routing:
                piece["choices"][0]["routing"] = self._routing([token])
            yield _event(piece)
        yield _event(self._piece({} if self.chat else "", finish_reason=self.answer.finish_reason))
        if self.with_usage:
            yield _event(self._head(".chunk") | {"choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _tokens(self) -> Iterator[ShownToken]:
        for token in self.answer:
            if self.is_left or self.closing.is_set():
                raise Refused("the answer was given up: the server ends, or nobody reads it", 503)
            yield token

    def _piece(self, said: Any, *, hidden: bool = False, finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of the stream; of the prompt's tokens, which are no part of the answer, only the routing is told."""
        content = ({} if self.chat else "") if hidden else said
        choice = {"index": 0, "delta" if self.chat else "text": content, "finish_reason": finish_reason}
        return self._head(".chunk") | {"choices": [choice]}

    def _head(self, chunk: str) -> dict[str, Any]:
        kind, prefix = (f"chat.completion{chunk}", "chatcmpl") if self.chat else ("text_completion", "cmpl")
        return {"id": f"{prefix}-{self.number}", "object": kind, "created": self.created, "model": self.model}

    def _usage(self) -> dict[str, int]:
        prompt, new = self.answer.prompt_tokens, self.answer.new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _routing(self, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        """{"experts": names, "tokens": [{"text", "from_prompt", "pair": numbers, "gates": layer by layer}]}."""
        return {
            "experts": list(self.experts),
            "tokens": [
                {"text": token.text, "from_prompt": token.from_prompt, "pair": list(token.pair),
                 "gates": [[round(gate, DECIMALS) for gate in gates_E] for gates_E in token.gates_LE]}
                for token in tokens
            ],
        }  # fmt: skip


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode() + b"\n\n"


def error_event(message: str) -> bytes:
    """What ends a stream that failed in the middle."""
    return _event(error_reply(message, "server_error"))


def error_reply(
    message: str, kind: str = "invalid_request_error", *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """What is replied to a request that cannot be answered."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
