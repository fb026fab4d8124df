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


Maker = Callable[[random.Random], Worked]
KINDS: dict[str, Maker] = {}
"""Kind of problem → function that draws one."""

NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jonas",
    "Lena",
    "Mark",
    "Nora",
    "Oscar",
    "Paula",
    "Robert",
    "Sara",
    "Tom",
    "Vera",
    "Will",
]
THINGS = ["apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "oranges", "pens", "stamps"]


def kind(name: str) -> Callable[[Maker], Maker]:
    """Register a function as the maker of one kind of problem."""

    def register(maker: Maker) -> Maker:
        KINDS[name] = maker
        return maker

    return register
