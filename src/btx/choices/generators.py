"""The domains whose text is made on the spot. No torch.

What makes the text is in `btx.data.domains`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Generator:
    """What there is to know of a generator without running it."""

    summary: str
    """One line for `btx ls domains`."""
    questions: bool = False
    """It has held-out questions with one gold answer each."""
    in_mixed_text: bool = False
    """Documents that switch domain in the middle are made of its text (`evaluate.mixed`, kind `generated`)."""


GENERATORS: dict[str, Generator] = {
    "math": Generator("generated worked problems", questions=True, in_mixed_text=True),
    "code": Generator("the Python standard library's sources", in_mixed_text=True),
    "knowledge": Generator("facts of a generated world, with closed-book questions", questions=True,
                           in_mixed_text=True),
    "general": Generator("docstrings of the Python standard library and the language reference", in_mixed_text=True),
}  # fmt: skip
