"""Documents that need two of the demo's domains at once, for measuring only: no model is trained on them.

In turn a word problem solved in Python, a calculation with facts of the generated world, and a function with its
docstring. All they are made of is on the held-out side of its domain: problems, renderings of facts, source files.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import cycle

from btx.data.domains import general_text, stdlib_code
from btx.data.domains.document import held_out_groups
from btx.data.domains.math_problems import problems
from btx.data.domains.math_registry import Worked
from btx.data.domains.stdlib_sources import documented_functions, read_source
from btx.data.domains.world_text import Renderings, renderings

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
"""A step that Python can do."""
NAMES = [("a", "b", "c"), ("x", "y", "z"), ("first", "second", "third"), ("n", "m", "k")]
EVENTS = {"birth year": "birth", "founding year": "founding"}
"""Relations whose values are years → what happened."""
FUNCTION_BYTES = (200, 1_500)
"""Functions shorter or longer than this are left out."""


def mixed_texts(rng_seed: int, count: int, held_out: float) -> list[str]:
    """`count` different documents, the same for the same arguments (and the same standard library).

    Args:
        rng_seed: the recipe's; the domains' training text has to come from the same one.
        count: documents wanted. Functions are finite: when there are no more, the others take their turn.
        held_out: share of the standard library's files that is held out (`data.held_out`).
    """
    kinds = [problems_in_python(rng_seed), facts_in_calculations(rng_seed), documented_code(rng_seed, held_out)]
    texts: dict[str, None] = {}
    for kind in cycle(kinds):
        if len(texts) == count:
            return list(texts)
        if (text := next((text for text in kind if text not in texts), None)) is not None:
            texts[text] = None
    raise AssertionError("the first two kinds do not end")


def problems_in_python(rng_seed: int) -> Iterator[str]:
    """Held-out problems all of whose steps are arithmetic, solved by a program that prints the answer's number."""
    rng = random.Random(f"mixed/python/{rng_seed}")
    for _, worked in problems("val", rng_seed, "mixed"):
        if (program := _program(worked, rng)) is not None:
            yield f"Problem: {worked.question}\nSolution in Python:\n\n{program}\n\nAnswer: {worked.answer}"


def facts_in_calculations(rng_seed: int) -> Iterator[str]:
    """Years between two events of the world, which the solution recalls before it subtracts them."""
    rng = random.Random(f"mixed/facts/{rng_seed}")
    dated = [item for item in renderings("val", rng_seed) if item.fact.relation in EVENTS]
    while True:
        earlier, later = sorted(rng.sample(dated, 2), key=lambda item: int(item.fact.value))
        first, second = int(earlier.fact.value), int(later.fact.value)
        if first < second:
            recalled = [rng.choice(item.statements) for item in rng.sample([earlier, later], 2)]
            yield (f"Problem: {_question(earlier, later, rng)}\nSolution: {' '.join(recalled)}\n"
                   f"{second} - {first} = {second - first}\nAnswer: {second - first} years")  # fmt: skip


def documented_code(rng_seed: int, held_out: float) -> Iterator[str]:
    """Functions of the standard library with their docstrings, from files held out of both code and general text;
    those that a file in train has too are left out."""
    code, prose = stdlib_code.pieces_of_code(), general_text.passages()
    held_code, held_prose = (held_out_groups(items, rng_seed, held_out) for items in (code, prose))
    files = sorted(held_code - ({item.group for item in prose} - held_prose))
    functions = [function for file in files for function in documented_functions(file)]
    shortest, longest = FUNCTION_BYTES
    fitting = [function for function in functions if shortest <= len(function.encode()) <= longest]
    random.Random(f"mixed/code/{rng_seed}").shuffle(fitting)
    trained = "\n".join(_unindented(piece.text) for piece in code if piece.group not in held_code)
    for function in fitting:
        if _unindented("".join(read_source("function", function.encode()).pieces)) not in trained:
            yield function


def _unindented(code: str) -> str:
    return "\n".join(line.strip() for line in code.strip().splitlines())


def _program(worked: Worked, rng: random.Random) -> str | None:
    """The steps as Python; None if Python cannot do one of them, or they do not lead to the answer."""
    steps = [STEP.fullmatch(step) for step in worked.steps]
    if not all(steps) or len(steps) > len(NAMES[0]) or worked.answer.split()[0] != worked.steps[-1].split()[-1]:
        return None
    names, known = rng.choice(NAMES), dict[str, str]()
    lines = []
    for step, name in zip(steps, names, strict=False):
        assert step is not None
        left, sign, right, result = step.groups()
        expression = f"{known.get(left, left)} {'//' if sign == '/' else sign} {known.get(right, right)}"
        lines.append((name, expression))
        known[result] = name
    script = [f"{name} = {expression}" for name, expression in lines]
    if rng.random() < 0.5:
        return "\n".join([*script, f"print({lines[-1][0]})"])
    inside = "\n".join(f"    {line}" for line in [*script[:-1], f"return {lines[-1][1]}"])
    return f"def solve():\n{inside}\n\nprint(solve())"


def _question(earlier: Renderings, later: Renderings, rng: random.Random) -> str:
    names = earlier.fact.entity, later.fact.entity
    events = [f"the {EVENTS[item.fact.relation]} of {item.fact.entity}" for item in (earlier, later)]
    if earlier.fact.relation == later.fact.relation == "birth year":
        return rng.choice([f"How many years older is {names[0]} than {names[1]}?",
                           f"By how many years is {names[1]} younger than {names[0]}?"])  # fmt: skip
    return rng.choice([f"How many years lie between {events[0]} and {events[1]}?",
                       f"How many years after {events[0]} came {events[1]}?"])  # fmt: skip
