"""Documents that need two of the demo's domains: right, reproducible, and never in training text."""

from __future__ import annotations

import re
from functools import cache

from btx.data.domains import documents, mixed_text
from btx.data.domains.mixed_text import mixed_texts
from btx.data.domains.world_text import renderings


@cache
def made() -> tuple[str, ...]:
    return tuple(mixed_texts(0, 90, 0.1))


def test_the_three_kinds_take_turns_and_the_same_arguments_give_the_same_texts():
    assert tuple(mixed_texts(0, 90, 0.1)) == made()
    assert tuple(mixed_texts(1, 90, 0.1)) != made()
    assert len(set(made())) == 90
    for number, text in enumerate(made()):
        assert ("Solution in Python:", "\nSolution: ", '"""')[number % 3] in text or (number % 3 == 2 and "'''" in text)


def test_the_programs_print_the_answer_s_number(capsys):
    for text in made()[::3]:
        program, answer = re.search(r"Python:\n\n(.*)\n\nAnswer: (\d+)", text, re.DOTALL).groups()
        exec(program, {})
        assert capsys.readouterr().out == f"{answer}\n"


def test_the_calculations_are_right_and_made_of_facts_in_their_held_out_wording():
    statements = {text: int(item.fact.value) for item in renderings("val", 0) for text in item.statements
                  if item.fact.relation in mixed_text.EVENTS}  # fmt: skip
    for text in made()[1::3]:
        recalled = [value for statement, value in statements.items() if statement in text]
        numbers = re.search(r"(\d+) - (\d+) = (\d+)\nAnswer: (\d+) years", text).groups()
        first, second, result, answer = map(int, numbers)
        assert {first, second} == set(recalled)
        assert first - second == result == answer > 0


def test_nothing_of_them_is_in_any_training_text():
    train = {name: "\0".join(item.text for item in documents(name, "train", 0, 2_000_000, 0.1))
             for name in ("math", "code", "knowledge", "general")}  # fmt: skip
    for text in made()[::3]:
        assert text.split("\n")[0] not in train["math"]
    for text in made()[1::3]:
        for sentence in re.findall(r"[^.?]+\.", text.split("Solution: ")[1].split("\n")[0]):
            assert sentence.strip() not in train["knowledge"]
    for text in made()[2::3]:
        docstring = re.search(r'(?:"""|\'\'\')\\?\s*(.{30,}?)\n', text)
        assert docstring is None or docstring[1].strip() not in train["general"]
        assert text.split("\n", 1)[1] not in train["code"]
