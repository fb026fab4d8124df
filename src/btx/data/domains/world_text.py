"""The knowledge domain: passages and questions about the generated world, so that recall of facts can be measured.

Every fact is stated in train, but each in all wordings except one, and asked in all question wordings except one:
these held-out renderings make up val. Of a fixed share of the facts (`NEVER_ASKED`) train has no question at all,
only statements. `questions` asks the held-out questions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from btx.data.domains.document import Document, Question, Split, byte_budget, position, up_to
from btx.data.domains.world import Fact, make_world
from btx.data.domains.world_wordings import QUESTIONS, STATEMENTS
from btx.errors import DataError

Item = TypeVar("Item")

NEVER_ASKED = 0.25
"""Share of the facts that train states but never asks."""


@dataclass(frozen=True)
class Renderings:
    """One fact's sentences and question-answer pairs on one side of the split; `questions` may be empty in train."""

    fact: Fact
    statements: list[str]
    questions: list[str]


def renderings(split: Split, rng_seed: int) -> list[Renderings]:
    """Every fact of the world in the wordings of one side."""
    result = []
    for fact in make_world(rng_seed):
        name = f"{fact.entity}/{fact.relation}"
        statements = [wording.format(x=fact.entity, y=fact.value) for wording in STATEMENTS[fact.relation]]
        questions = [_question(wording.format(x=fact.entity), fact.value) for wording in QUESTIONS[fact.relation]]
        held_statement = statements.pop(int(position(f"{name}/statement", rng_seed) * len(statements)))
        held_question = questions.pop(int(position(f"{name}/question", rng_seed) * len(questions)))
        if split == "val":
            statements, questions = [held_statement], [held_question]
        elif is_never_asked(fact, rng_seed):
            questions = []
        result.append(Renderings(fact, statements, questions))
    return result


def is_never_asked(fact: Fact, rng_seed: int) -> bool:
    """Whether train only states this fact."""
    return position(f"{fact.entity}/{fact.relation}/never asked", rng_seed) < NEVER_ASKED


def documents(split: Split, rng_seed: int, max_bytes: int, held_out: float) -> Iterator[Document]:
    """Passages and question-answer documents; `held_out` sets the bytes of val, the wordings held out are fixed."""
    return up_to(_endless_documents(split, rng_seed), byte_budget(split, max_bytes, held_out))


def questions(rng_seed: int, count: int) -> list[Question]:
    """The held-out question of `count` different facts, asked or never asked in train as they come."""
    facts = renderings("val", rng_seed)
    if count > len(facts):
        raise DataError(f"the knowledge generator has {len(facts)} held-out questions; {count} were asked for")
    asked = random.Random(f"knowledge/questions/{rng_seed}").sample(facts, count)
    return [
        Question(full.removesuffix(f" {item.fact.value}"), item.fact.value, full)
        for item in asked
        for full in item.questions
    ]


def _question(question: str, answer: str) -> str:
    return f"Question: {question}\nAnswer: {answer}"


def _endless_documents(split: Split, rng_seed: int) -> Iterator[Document]:
    """In turn: a passage on one entity, a passage of mixed facts, questions and answers; each covers all facts."""
    rng = random.Random(f"knowledge/{split}/{rng_seed}")
    facts = renderings(split, rng_seed)
    entities: dict[str, list[Renderings]] = {}
    for item in facts:
        entities.setdefault(item.fact.entity, []).append(item)
    about_one = _shuffled_forever(rng, list(entities.values()))
    mixed = _shuffled_forever(rng, facts)
    asked = _shuffled_forever(rng, [item for item in facts if item.questions])
    number = 0
    while True:
        portrait = next(about_one)
        texts = [
            _passage(rng, rng.sample(portrait, len(portrait))),
            _passage(rng, [next(mixed) for _ in range(rng.randint(2, 5))]),
            *("\n".join(rng.choice(next(asked).questions) for _ in range(rng.randint(1, 3))) for _ in range(2)),
        ]
        for text in texts:
            yield Document(text, f"{split} {number}")
            number += 1


def _passage(rng: random.Random, facts: list[Renderings]) -> str:
    return " ".join(rng.choice(item.statements) for item in facts)


def _shuffled_forever(rng: random.Random, items: list[Item]) -> Iterator[Item]:
    while True:
        yield from rng.sample(items, len(items))
