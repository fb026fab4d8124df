"""The math domain: worked problems of 34 kinds, small numbers, every step written out.

A problem is its kind and its parameters; a tenth of all problems is held out for good, whatever the wording or the
names in it, so val documents and questions hold no problem of train.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from btx.data.domains import math_algebra, math_arithmetic, math_numbers, math_stories  # noqa: F401  (they register kinds)
from btx.data.domains.document import Document, Question, Split, byte_budget, position, up_to
from btx.data.domains.math_registry import KINDS, Worked

HELD_OUT_PROBLEMS = 0.1
"""Share of each kind's problems that never enters train."""
MOST_DRAWS = 1_000
"""Draws of one kind until a problem of the wanted side must have turned up, else the kind is passed over this time."""


def problem_id(kind: str, worked: Worked) -> str:
    """Kind and parameters: what makes two problems the same."""
    return f"{kind} {worked.parameters}"


def problems(split: Split, rng_seed: int, purpose: str) -> Iterator[tuple[str, Worked]]:
    """An endless stream of (kind, problem) of one side; kinds come in equal shares."""
    rng = random.Random(f"math/{purpose}/{split}/{rng_seed}")
    kinds = list(KINDS)
    while True:
        rng.shuffle(kinds)
        for kind in kinds:
            draws = (KINDS[kind](rng) for _ in range(MOST_DRAWS))
            for worked in draws:
                if is_held_out(problem_id(kind, worked), rng_seed) == (split == "val"):
                    yield kind, worked
                    break


def is_held_out(problem: str, rng_seed: int) -> bool:
    """Whether a problem is on the val side."""
    return position(problem, rng_seed) < HELD_OUT_PROBLEMS


def documents(split: Split, rng_seed: int, max_bytes: int, held_out: float) -> Iterator[Document]:
    """One worked problem a document; `held_out` sets the bytes of val, `HELD_OUT_PROBLEMS` which problems it has."""
    stream = problems(split, rng_seed, "documents")
    made = (Document(worked.text, problem_id(kind, worked)) for kind, worked in stream)
    return up_to(made, byte_budget(split, max_bytes, held_out))


def questions(rng_seed: int, count: int) -> list[Question]:
    """Different held-out problems; the prompt ends at "Solution:", the gold continuation ends with the answer."""
    by_id: dict[str, Question] = {}
    stream = problems("val", rng_seed, "questions")
    while len(by_id) < count:
        kind, worked = next(stream)
        by_id.setdefault(problem_id(kind, worked), Question(worked.prompt, worked.answer, worked.text))
    return list(by_id.values())
