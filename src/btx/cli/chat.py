"""Complete prompts with a model, token by token, coloured by the pair of experts that made each token.

Shape letters: B batch, S sequence, V vocabulary, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import cast
from unicodedata import category

import torch
from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text

from btx.errors import UserError
from btx.models.loading import load_tokenizer
from btx.serving.completing import (
    complete_token_by_token,
    count_experts,
    expert_names,
    load_to_chat,
    pick,
    prompt_ids,
)
from btx.serving.refusals import check_completion

PALETTE = (
    "bright_blue", "bright_green", "bright_magenta", "bright_yellow", "bright_cyan", "bright_red",
    "blue", "green", "magenta", "yellow", "cyan", "red",
)  # fmt: skip


def chat(
    model_path: Path, *, prompt: str | None = None, show_experts: bool = False, max_new_tokens: int = 200,
    temperature: float = 0.0, rng_seed: int = 0, console: Console | None = None,
) -> None:  # fmt: skip
    """Print the completion of a prompt, or of every line that is typed until Ctrl-D.

    A tokenizer with a chat template gets the prompt as a user's message; a base model completes it.

    Args:
        model_path: model folder.
        prompt: text to complete; None reads prompts from the terminal.
        show_experts: print prompt and completion, each token in the colour of its top pair of experts, with a legend.
        max_new_tokens: tokens generated at most.
        temperature: 0 takes the likeliest token; above, tokens are sampled.
        rng_seed: random number seed of the sampling.
        console: where to print; default: standard output.

    Raises:
        CheckpointError: no such model, or a dense one with `show_experts`.
        UserError: a negative temperature, or a prompt that is no valid text.
    """
    check_completion(model_path, temperature, prompt)
    console = console or Console(highlight=False)
    model, tokenizer = load_to_chat(model_path, _say), load_tokenizer(model_path)
    if show_experts:
        _print_legend(console, expert_names(model_path, model))
    random = torch.Generator().manual_seed(rng_seed)
    for text in _typed(console) if prompt is None else [prompt]:
        try:
            ids = prompt_ids(tokenizer, text)
        except UserError as error:
            if prompt is not None:
                raise
            console.out(f"error: {error}", highlight=False)  # the next line may be better
            continue
        for token in complete_token_by_token(model, tokenizer, ids, max_new_tokens, pick(temperature, random)):
            if show_experts or not token.from_prompt:
                style = pair_style(token.pair, count_experts(model)) if show_experts else ""
                _print(console, token.text, style)
        console.print()


def _say(line: str) -> None:
    """A remark that is no part of the answer."""
    print(line, file=sys.stderr)


def _print(console: Console, text: str, style: str) -> None:
    """Print a token as it is, tabs and all; what would steer a terminal is left out on one."""
    if console.is_terminal:
        text = "".join(sign for sign in text if sign in "\n\t" or category(sign) != "Cc")
    console.print(Segments([Segment(text, console.get_style(style))]), end="", soft_wrap=True)


def pair_style(pair: tuple[int, ...], num_experts: int) -> str:
    """Colour of a pair of experts; after twelve pairs colours come again, underlined."""
    if not pair:
        return ""
    number = list(combinations(range(num_experts), 2)).index(cast(tuple[int, int], pair))
    return PALETTE[number % len(PALETTE)] + (" underline" if number >= len(PALETTE) else "")


def _print_legend(console: Console, names: Sequence[str]) -> None:
    """One line with every pair of experts in its colour."""
    legend = Text("   ").join(
        Text(f"{names[a]} + {names[b]}", style=pair_style((a, b), len(names)))
        for a, b in combinations(range(len(names)), 2)
    )
    console.print(legend, end="\n\n")


def _typed(console: Console) -> Iterator[str]:
    """Lines from the terminal until Ctrl-D; empty ones are skipped."""
    while True:
        try:
            line = console.input("[bold]> [/bold]")
        except EOFError:
            console.print()
            return
        if line.strip():
            yield line
