"""Talk to a model in the terminal: answers token by token, coloured by the pair of experts that made each token."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import cast
from unicodedata import category

from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text

from btx.cli.terminal import remark
from btx.errors import CheckpointError, UserError
from btx.serving.completing import ShownToken
from btx.serving.sampling import ExpertChoice, Sampling
from btx.serving.speaker import Message, Speaker, prompt_ids

PALETTE = (
    "bright_blue", "bright_green", "bright_magenta", "bright_yellow", "bright_cyan", "bright_red",
    "blue", "green", "magenta", "yellow", "cyan", "red",
)  # fmt: skip
ANEW = "/new"
"""Line that begins a new conversation."""


def chat(
    model_path: Path, *, prompt: str | None = None, show_experts: bool = False, sampling: Sampling = Sampling(),
    experts: ExpertChoice = ExpertChoice(), console: Console | None = None,
) -> None:  # fmt: skip
    """Print the answer to a prompt, or to every line that is typed until Ctrl-D.

    With a chat template lines are the messages of a conversation, which `/new` begins anew; a base model completes each
    line for itself. Ctrl-C ends an answer, and between answers the program.

    Args:
        prompt: text to answer; None reads lines from the terminal, or from whatever is piped in.
        show_experts: print prompt and answer, each token in the colour of its top pair of experts, with a legend.
        sampling: how answers are drawn.
        experts: which experts may be used.
        console: where to print; default: standard output.

    Raises:
        CheckpointError: no such model, or a dense one with `show_experts`.
        UserError: a prompt that is no valid text, or experts that are not there.
    """
    console = console or Console(highlight=False)
    speaker = Speaker(model_path, remark)
    if show_experts and not speaker.expert_names:
        raise CheckpointError(f"{model_path}: a dense model has no experts to show; leave out --show-experts")
    experts.allowed(speaker.expert_names)  # refused before the first line is typed
    talk = _Talk(speaker, sampling, experts, console, show_experts)
    talk.legend()
    if prompt is not None:
        talk.answer(prompt)
        return
    for line in _typed(console):
        try:
            talk.answer(line)
        except UserError as error:
            remark(f"error: {error}")  # the next line may be better
        except KeyboardInterrupt:
            console.print()


class _Talk:
    """A conversation, and how it is printed."""

    def __init__(
        self, speaker: Speaker, sampling: Sampling, experts: ExpertChoice, console: Console, show_experts: bool
    ) -> None:
        self.speaker, self.sampling, self.experts = speaker, sampling, experts
        self.console, self.show_experts = console, show_experts
        self.messages: list[Message] = []
        self.answers = 0

    def answer(self, line: str) -> None:
        """Print the answer to a line."""
        if line.strip() == ANEW:
            self.messages = []
            return
        text = ""
        try:
            for token in self._answer(line):
                text += "" if token.from_prompt else token.text
                if self.show_experts or not token.from_prompt:
                    style = pair_style(token.pair, len(self.speaker.expert_names)) if self.show_experts else ""
                    _print(self.console, token.text, style)
        finally:  # what was said before Ctrl-C was said
            if self.speaker.has_template and text:
                self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]
        self.console.print()

    def _answer(self, line: str) -> Iterator[ShownToken]:
        sampling = replace(self.sampling, rng_seed=self.sampling.rng_seed + self.answers)
        self.answers += 1
        if not self.speaker.has_template:
            return iter(self.speaker.answer(prompt_ids(self.speaker.tokenizer, line), sampling, self.experts))
        while True:
            ids = prompt_ids(self.speaker.tokenizer, [*self.messages, {"role": "user", "content": line}])
            if len(ids) + sampling.max_new_tokens <= self.speaker.longest or not self.messages:
                return iter(self.speaker.answer(ids, sampling, self.experts))
            self.messages = self.messages[2:]  # the oldest question and its answer

    def legend(self) -> None:
        """One line with every pair of experts in its colour."""
        if not self.show_experts:
            return
        names = self.speaker.expert_names
        legend = Text("   ").join(
            Text(f"{names[a]} + {names[b]}", style=pair_style((a, b), len(names)))
            for a, b in combinations(range(len(names)), 2)
        )
        self.console.print(legend, end="\n\n")


def _print(console: Console, text: str, style: str) -> None:
    """Print a token as it is, tabs and all; what would steer a terminal is left out on one."""
    if console.is_terminal:
        text = "".join(sign for sign in text if sign in "\n\t" or category(sign) != "Cc")
    console.print(Segments([Segment(text, console.get_style(style))]), end="", soft_wrap=True)


def pair_style(pair: Sequence[int], num_experts: int) -> str:
    """Colour of a pair of experts; after twelve pairs colours come again, underlined. A single expert has that of its
    first pair, in bold."""
    if not pair:
        return ""
    if len(pair) == 1:
        return PALETTE[pair[0] % len(PALETTE)] + " bold"
    number = list(combinations(range(num_experts), 2)).index(cast(tuple[int, int], tuple(pair)))
    return PALETTE[number % len(PALETTE)] + (" underline" if number >= len(PALETTE) else "")


def _typed(console: Console) -> Iterator[str]:
    """Lines from the terminal, or piped in, until they end or Ctrl-C; empty ones are skipped."""
    asks = sys.stdin.isatty()
    while True:
        try:
            line = console.input("[bold]> [/bold]" if asks else "")
        except (EOFError, KeyboardInterrupt):
            if asks:
                console.print()
            return
        if line.strip():
            yield line
