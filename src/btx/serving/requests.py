"""What is asked of `btx serve`, as OpenAI's interface has it (https://platform.openai.com/docs/api-reference/chat), and
`experts` besides: {"only": [names], "without": [names]}. Plain Python.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from btx.errors import UserError
from btx.serving.sampling import ExpertChoice

LONGEST_TEXT = 1_000_000
"""Characters of a prompt or message, at most."""
MOST_STOPS = 16
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
REFUSED = {
    "n": "one answer a request; ask again, with another seed",
    "best_of": "one answer a request; ask again, with another seed",
    "prompt": f"one text a request, no token ids, {LONGEST_TEXT:,} characters at most",
    "stop": f"{MOST_STOPS} texts at most, none of them empty",
    "logprobs": "answers come without log-probabilities; `btx evaluate` measures them",
    "tools": "answers call no tools",
    "response_format": "answers are text",
    "logit_bias": "tokens have no bias here; `experts` says which experts may be used",
    "frequency_penalty": "repetitions have no penalty here",
    "presence_penalty": "repetitions have no penalty here",
    "echo": "the prompt is not repeated; `routing` has its tokens",
    "suffix": "nothing is known of what follows",
}
"""What OpenAI's interface has and btx has not, and would change the answer: field → why it is refused."""


class Refused(UserError):
    """A request that is not answered.

    Args:
        status: of HTTP.
        param: the request's field that is to blame.
        code: OpenAI's word for what is wrong, where it has one.
    """

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class _Section(BaseModel):
    # What the interface has and btx has not (user, metadata, ...) is passed over, as others do; what would change the
    # answer is refused below.
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class TextPart(_Section):
    """A part of a message that has several."""

    type: Literal["text"]
    text: Text


class AskedMessage(_Section):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    def as_message(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class AskedExperts(_Section):
    """Which experts may be used."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    only: list[str] = []
    without: list[str] = []


class StreamOptions(_Section):
    """What a stream holds besides."""

    include_usage: bool = False


class TextFormat(_Section):
    """What an answer looks like: text."""

    type: Literal["text"]


class Asked(_Section):
    """What both kinds of request share."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False, strict=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, strict=False)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=MOST_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    experts: AskedExperts = AskedExperts()
    routing: bool = True
    """Whether answers tell which experts each token used."""
    logprobs: Literal[False, 0] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0, strict=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0, strict=False)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the answer."""
        return tuple([self.stop] if isinstance(self.stop, str) and self.stop else self.stop or ())

    @property
    def choice(self) -> ExpertChoice:
        """The experts that may be used."""
        return ExpertChoice(tuple(self.experts.only), tuple(self.experts.without))


class ChatRequest(Asked):
    """POST /v1/chat/completions"""

    messages: Annotated[list[AskedMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None


class CompletionRequest(Asked):
    """POST /v1/completions"""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def text(self) -> str:
        """The text to complete."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


def read_request(kind: type[ChatRequest] | type[CompletionRequest], body: bytes) -> ChatRequest | CompletionRequest:
    """A request from its JSON."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        # The last parts of the place may be pydantic's names of kinds of texts, which are nobody's fields.
        where = ".".join(str(part) for part in first["loc"] if part not in ("constrained-str", "str"))
        field = where.partition(".")[0] or None
        why = REFUSED.get(field or "", first["msg"])
        raise Refused(f"{where or 'the request'}: {why}", param=field) from None
