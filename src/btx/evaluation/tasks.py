"""Tasks: questions answered greedily, scored by exact match.

Shape letters: B batch, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from btx.data.chat_text import question_ids
from btx.data.domains import Question
from btx.data.token_files import DocumentEncoder
from btx.models.measuring_memory import ANSWERING
from btx.models.outputs import SideBySide, open_reader
from btx.process import note_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from btx.recipe.evaluate import Task

BATCH_TOKENS = ANSWERING.tokens
"""Prompt and new tokens of all questions answered at once."""
EXAMPLES = 6
"""Questions shown with their answers; the same ones for every model."""


@dataclass(frozen=True)
class Answer:
    """One question with what the model said."""

    prompt: str
    output: str
    gold: str
    correct: bool


@dataclass(frozen=True)
class ExactMatch:
    """Share of questions answered exactly."""

    answers: list[Answer]

    @property
    def exact_match(self) -> float:
        """Share of correct answers."""
        return sum(answer.correct for answer in self.answers) / len(self.answers)

    @property
    def stderr(self) -> float:
        """Binomial standard error, sqrt(p (1 - p) / n)."""
        return math.sqrt(self.exact_match * (1 - self.exact_match) / len(self.answers))

    def as_json(self) -> dict[str, Any]:
        """The entry of results.json."""
        return {
            "exact_match": self.exact_match, "stderr": self.stderr, "questions": len(self.answers),
            "examples": [asdict(self.answers[i]) for i in example_numbers(len(self.answers))],
        }  # fmt: skip


def example_numbers(questions: int) -> range:
    """Which of so many questions are shown."""
    return range(0, questions, max(1, questions // EXAMPLES))[:EXAMPLES]


def exact_match(
    model: PreTrainedModel | SideBySide, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], task: Task
) -> ExactMatch:
    """Answer every question greedily and compare with its gold answer.

    Args:
        task: `answer_after` and `max_new_tokens` decide where an answer is and how long the model may take.
    """
    prompts = [question.prompt for question in questions]
    outputs = complete(model, tokenizer, prompts, task.answer_after, task.max_new_tokens, chat=task.chat)
    answers = []
    for question, output in zip(questions, outputs, strict=True):
        answer, gold = final_answer(output, task.answer_after), gold_answer(question.answer, task.answer_after)
        answers.append(Answer(question.prompt, output, gold, answer == gold))
    return ExactMatch(answers)


def final_answer(output: str, answer_after: str | None) -> str | None:
    """What counts of an output: the line after the last `answer_after`, else the first line that is not empty.

    White space is collapsed. None: the output does not hold `answer_after`.
    """
    if answer_after is not None:
        _, marker, output = output.rpartition(answer_after)
        if not marker:
            return None
    return " ".join(output.strip().partition("\n")[0].split())


def gold_answer(gold: str, answer_after: str | None) -> str:
    """The gold answer, white space collapsed: what follows `answer_after` where it holds that, else all of it."""
    marked = final_answer(gold, answer_after) if answer_after is not None else None
    return " ".join(gold.split()) if marked is None else marked


def complete(
    model: PreTrainedModel | SideBySide, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str],
    answer_after: str | None, max_new_tokens: int, *, chat: bool = False,
) -> list[str]:  # fmt: skip
    """Greedy continuations, batched with left padding; a prompt starts like a document, with the separator.

    A continuation ends at the end-of-text token, at the line end after its answer, or after `max_new_tokens`.

    Args:
        chat: ask a model with a chat template each prompt as a user's message.

    Returns:
        One text a prompt, without special tokens.
    """
    if chat and getattr(tokenizer, "chat_template", None):
        encoded = [question_ids(tokenizer, prompt) for prompt in prompts]
    else:
        encoded = list(map(DocumentEncoder(tokenizer).beginning, prompts))
    line_ends = _line_end_tokens(tokenizer)

    def ends(new_ids: list[int]) -> bool:
        if new_ids[-1] == tokenizer.eos_token_id:
            return True
        return new_ids[-1] in line_ends and has_answer_line(_decode(tokenizer, new_ids), answer_after)

    outputs = [""] * len(prompts)
    for batch in _batches([len(ids) for ids in encoded], max_new_tokens):
        for i, new_ids in zip(batch, _greedy(model, [encoded[i] for i in batch], max_new_tokens, ends), strict=True):
            outputs[i] = _decode(tokenizer, new_ids)
    return outputs


def go_on(
    model: PreTrainedModel | SideBySide, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int
) -> list[str]:
    """How a model goes on with each text: `new_tokens` greedy tokens, fewer where the end-of-text token comes."""
    encoded = list(map(DocumentEncoder(tokenizer).beginning, prompts))
    new_ids = _greedy(model, encoded, new_tokens, lambda ids: ids[-1] == tokenizer.eos_token_id) if prompts else []
    return [_decode(tokenizer, ids) for ids in new_ids]


@torch.inference_mode()
def _greedy(
    model: PreTrainedModel | SideBySide, prompts: Sequence[list[int]], max_new_tokens: int,
    ends: Callable[[list[int]], bool],
) -> list[list[int]]:  # fmt: skip
    """New tokens of each prompt.

    transformers' `generate` says the same, but goes on computing finished rows until the longest one ends. Here they
    leave the batch: the gold answers of the generated math questions have 28 tokens in the mean, the longest has 96.
    """
    width, device = max(map(len, prompts)), model.device
    ids_BS = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask_BS = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    new_ids: list[list[int]] = [[] for _ in prompts]
    running, reader = list(range(len(prompts))), open_reader(model)
    while True:
        note_progress()
        next_B = reader.scores(ids_BS, mask_BS).argmax(dim=-1)
        for row, token in zip(running, next_B.tolist(), strict=True):
            new_ids[row].append(token)
        stay = [b for b, row in enumerate(running) if len(new_ids[row]) < max_new_tokens and not ends(new_ids[row])]
        if not stay:
            return new_ids
        if len(stay) < len(running):
            keep_B = torch.tensor(stay, device=device)
            reader.keep(keep_B)
            running = [running[b] for b in stay]
            next_B, ids_BS, mask_BS = next_B[keep_B], ids_BS[keep_B], mask_BS[keep_B]
        ids_BS = torch.cat([ids_BS, next_B[:, None]], dim=1)
        mask_BS = torch.cat([mask_BS, torch.ones_like(next_B)[:, None]], dim=1)


def _batches(lengths: Sequence[int], max_new_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts answered together: alike in length, so that little is padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * (lengths[i] + max_new_tokens) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def has_answer_line(text: str, answer_after: str | None) -> bool:
    """Whether a line with the answer has ended in `text`."""
    if answer_after is not None:
        _, marker, text = text.partition(answer_after)
        if not marker:
            return False
    return "\n" in text.lstrip()


def _line_end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens whose text holds a line end: only after these is an output worth decoding."""
    return {i for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])) if "\n" in text}


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
