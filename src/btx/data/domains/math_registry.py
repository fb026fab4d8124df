"""A worked problem, and the registry that every kind of problem enters by `@kind`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Worked:
    """A problem with its solution. The answer follows from `parameters` alone; wording and names do not enter them."""

    parameters: dict[str, Any]
    question: str
    steps: list[str]
    answer: str

    @property
    def prompt(self) -> str:
        return f"Problem: {self.question}\nSolution:"

    @property
    def text(self) -> str:
        return "\n".join([f"{self.prompt} {self.steps[0]}", *self.steps[1:], f"Answer: {self.answer}"])


Drawn = tuple[dict[str, Any], list[str], list[str], str]
"""Parameters, wordings of the question, steps and answer of a problem."""
KINDS: dict[str, Callable[[random.Random], Worked]] = {}
"""Kind of problem → function that draws one."""

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Lena Mark Nora Oscar Paula Robert Sara Tom Vera Will"
).split()
THINGS = ["apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "oranges", "pens", "stamps"]


def kind(draw: Callable[[random.Random], Drawn]) -> Callable[[random.Random], Drawn]:
    """Register a function as what draws the kind of problem that it is called after."""

    def worked(rng: random.Random) -> Worked:
        parameters, wordings, steps, answer = draw(rng)
        return Worked(parameters, rng.choice(wordings), steps, answer)

    KINDS[draw.__name__] = worked
    return draw
