"""A model that answers: what chat, `btx.serving.server` and Python programs talk to."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from btx.baselines.btm_model import BtmModel, load_model_or_btm
from btx.data.token_files import DocumentEncoder
from btx.errors import CheckpointError, UserError
from btx.model_files.model_folder import check_model_or_btm
from btx.models.device import choose_device
from btx.models.expert_names import names_of_experts
from btx.models.loading import load_tokenizer
from btx.models.outputs import SideBySide
from btx.models.placement import Place
from btx.process import Log
from btx.serving.completing import ShownToken, complete_token_by_token, pick, until_stop
from btx.serving.sampling import ExpertChoice, Sampling, check_prompt
from btx.system_errors import blame, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = Mapping[str, str]
"""{"role": system, user or assistant, "content": text}."""


class Answer:
    """An answer under way: its tokens as they come, those of the prompt first."""

    def __init__(self, tokens: Iterator[ShownToken], sampling: Sampling, prompt_tokens: int, limit: int) -> None:
        self.prompt_tokens, self.new_tokens = prompt_tokens, 0
        self.finish_reason: str = "stop"
        """Why it ended: `stop`, by itself or at a stop string; `length`, by its limit."""
        self._tokens, self._stops, self._limit = tokens, sampling.stop, limit

    def __iter__(self) -> Iterator[ShownToken]:
        stopped = yield from until_stop(self._counted(), self._stops)
        if not stopped and self.new_tokens >= self._limit:
            self.finish_reason = "length"

    def _counted(self) -> Iterator[ShownToken]:
        for token in self._tokens:
            self.new_tokens += not token.from_prompt and token.token_id is not None
            yield token


class Speaker:
    """A model folder, loaded where it answers: on the GPU if there is one. Several threads may ask at once; their
    forward passes take turns.

    Args:
        path: model folder, or a Branch-Train-Merge folder.
        log: called with a line where it does not fit one device.
    """

    def __init__(self, path: Path, log: Log = lambda line: None) -> None:
        check_model_or_btm(path)
        self.model: PreTrainedModel | SideBySide = load_model_or_btm(path, Place(choose_device("auto").type, log=log))
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(path)
        self.expert_names: list[str] = (
            list(self.model.members) if isinstance(self.model, BtmModel)
            else names_of_experts(cast("PreTrainedModel", self.model), path)
        )  # fmt: skip
        """Names of its experts; of Branch-Train-Merge its models; empty for a dense model."""
        self._turn = threading.Lock()

    @property
    def has_template(self) -> bool:
        """Whether it is for conversations: its tokenizer writes messages as text."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer together, at most."""
        config = cast(Any, next(iter(self.model.members.values())) if isinstance(self.model, BtmModel) else self.model)
        return int(getattr(config.config, "max_position_embeddings", None) or 2**31)

    def answer(
        self, prompt: Sequence[int], sampling: Sampling = Sampling(), experts: ExpertChoice = ExpertChoice()
    ) -> Answer:
        """Begin to answer; nothing is computed before the first token is asked for.

        Raises:
            UserError: what `experts` asks for cannot be, or the prompt is as long as the model can read.
        """
        if len(prompt) >= self.longest:
            raise UserError(f"the prompt has {len(prompt)} tokens, and with its answer the model reads "
                            f"{self.longest} at most; shorten it")  # fmt: skip
        allowed = experts.allowed(self.expert_names)
        if allowed is not None and isinstance(self.model, BtmModel):
            raise UserError("experts cannot be chosen in Branch-Train-Merge, whose models answer side by side")
        limit = min(sampling.max_new_tokens, self.longest - len(prompt))
        choose = pick(sampling.temperature, torch.Generator().manual_seed(sampling.rng_seed), sampling.top_p)
        tokens = complete_token_by_token(
            self.model, self.tokenizer, prompt, limit, choose, turn=self._turn,
            allowed_E=None if allowed is None else torch.tensor(allowed),
        )  # fmt: skip
        return Answer(tokens, sampling, len(prompt), limit)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message]) -> list[int]:
    """Tokens of a prompt: messages as the chat template says, and so is a text where there is one; else a text is like
    a document's start.

    Raises:
        UserError: the prompt is no valid text, or messages for a model without a template.
        CheckpointError: the chat template is broken, refuses the messages or makes nothing of them.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages:
        check_prompt(message["content"])
    if not getattr(tokenizer, "chat_template", None):
        if not isinstance(prompt, str):
            raise UserError("this model has no chat template: it completes a text, and takes no messages")
        return text_ids(tokenizer, prompt)
    where = f"{tokenizer.name_or_path}: its chat template"
    otherwise = "Mend chat_template.jinja, or move it away and the prompt is completed as plain text"
    try:
        rendered = cast(str, tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True))  # fmt: skip
    except Exception as error:  # a template may raise anything
        blame(error)
        raise CheckpointError(
            f"{where} does not take the message: {first_line(error)} ({type(error).__name__}). {otherwise}"
        ) from error
    ids = cast(list[int], tokenizer.encode(rendered, add_special_tokens=False))
    if not ids:
        raise CheckpointError(f"{where} makes nothing of the message. {otherwise}")
    return ids


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text to complete, like a document's start; raises UserError if it is no valid text."""
    check_prompt(text)
    return DocumentEncoder(tokenizer).beginning(text)


def completion(
    model_path: Path, prompt: str, sampling: Sampling = Sampling(), experts: ExpertChoice = ExpertChoice()
) -> dict[str, Any]:
    """A completion as a JSON value: {"prompt", "completion", "experts": names or null, "tokens"}.

    Each of `tokens` is {"text", "experts": [names of the two with the most gate weight], "from_prompt"}, prompt's and
    completion's in order.
    """
    speaker = Speaker(model_path)
    names = speaker.expert_names
    shown = list(speaker.answer(prompt_ids(speaker.tokenizer, prompt), sampling, experts))
    return {
        "prompt": prompt,
        "completion": "".join(token.text for token in shown if not token.from_prompt),
        "experts": names or None,
        "tokens": [
            {"text": token.text, "experts": [names[i] for i in token.pair], "from_prompt": token.from_prompt}
            for token in shown
        ],
    }
