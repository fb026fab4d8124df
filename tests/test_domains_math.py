"""Every kind of math problem, confirmed by an independent computation in sympy."""

import random
import re
from datetime import datetime, timedelta
from itertools import pairwise

import pytest
import sympy
from sympy.abc import x, y

from btx.data.domains import documents, questions
from btx.data.domains.math_problems import HELD_OUT_PROBLEMS, is_held_out, problem_id, problems
from btx.data.domains.math_registry import KINDS

SAMPLES = 40
UNIT_IN_BASE = {
    "metres": 1,
    "centimetres": sympy.Rational(1, 100),
    "millimetres": sympy.Rational(1, 1000),
    "kilometres": 1000,
    "seconds": 1,
    "minutes": 60,
    "hours": 3600,
    "days": 86400,
    "weeks": 604800,
    "months": 1,
    "years": 12,
    "kilograms": 1000,
    "grams": 1,
    "dozens": 12,
    "pieces": 1,
}
WORDS = {
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}


def in_words(words):
    total = 0
    for word in re.split("[ -]", words):
        total = total * 100 if word == "hundred" else total + WORDS[word]
    return total


def weekday_after(today, days):
    monday = datetime(2024, 1, 1)
    start = next(monday + timedelta(days=i) for i in range(7) if f"{monday + timedelta(days=i):%A}" == today)
    return f"{start + timedelta(days=days):%A}"


def clock_after(hour, minute, duration):
    moment = datetime(2024, 1, 1, hour, minute) + timedelta(minutes=duration)
    return f"{moment.hour}:{moment.minute:02}"


def next_by_ratio(terms):
    (ratio,) = {sympy.Rational(b, a) for a, b in pairwise(terms)}
    return terms[-1] * ratio


def next_by_difference(terms):
    n = sympy.Symbol("n")
    line = sympy.interpolate(list(enumerate(terms)), n)
    assert sympy.degree(line, n) == 1
    return line.subs(n, len(terms))


def is_written_as(polynomial, text):
    """The text is this polynomial, in the order of the powers."""
    parsed = sympy.sympify(re.sub(r"(\d)x", r"\1*x", text).replace("^", "**"))
    powers = [int(power or 1) for power in re.findall(r"x(?:\^(\d+))?", text)]
    return sympy.expand(polynomial - parsed) == 0 and powers == sorted(powers, reverse=True)


def factors(n):
    return " * ".join(str(p) for p, power in sorted(sympy.factorint(n).items()) for _ in range(power))


def solution_of_system(sum, difference):
    solution = sympy.solve([x + y - sum, x - y - difference], [x, y])
    return f"x = {solution[x]}, y = {solution[y]}"


ANSWERS = {
    "addition": lambda a, b, c: sympy.Integer(a) + b + c,
    "subtraction": lambda a, b: sympy.Integer(a) - b,
    "multiplication": lambda a, b: sympy.Integer(a) * b,
    "remainder": lambda a, b: sympy.Mod(a, b),
    "order_of_operations": lambda a, b, c: sympy.sympify(f"{a} + {b} * {c}"),
    "compare": lambda a, b: sympy.Max(a, b),
    "largest": lambda numbers: sympy.Max(*numbers),
    "rounding": lambda n: 10 * sympy.floor(sympy.Rational(n, 10) + sympy.Rational(1, 2)),
    "place_value": lambda n, place: n // {"hundreds": 100, "tens": 10, "ones": 1}[place] % 10,
    "fraction_sum": lambda a, b, d: sympy.Rational(a, d) + sympy.Rational(b, d),
    "fraction_of": lambda p, q, n: sympy.Rational(p, q) * n,
    "percent": lambda percent, n: sympy.Rational(percent, 100) * n,
    "gcd": lambda a, b: sympy.gcd(a, b),
    "prime": lambda n: "yes" if sympy.isprime(n) else "no",
    "modular": lambda a, b, m: sympy.Mod(a + b, m),
    "arithmetic_sequence": next_by_difference,
    "median": lambda numbers: next(n for n in numbers if sum(m < n for m in numbers) == sum(m > n for m in numbers)),
    "choices": lambda a, b: sympy.binomial(a, 1) * sympy.binomial(b, 1),
    "linear_shift": lambda a, b: sympy.solve(x + a - b, x)[0],
    "linear": lambda a, b, c: sympy.solve(a * x + b - c, x)[0],
    "perimeter": lambda a, b: sympy.Polygon((0, 0), (a, 0), (a, b), (0, b)).perimeter,
    "area": lambda a, b: sympy.Polygon((0, 0), (a, 0), (a, b), (0, b)).area,
    "triangle_area": lambda base, height: sympy.Triangle((0, 0), (base, 0), (1, height)).area,
    "unit_conversion": lambda n, **units: (
        f"{n * UNIT_IN_BASE[units['from']] / UNIT_IN_BASE[units['to']]:.0f} {units['to']}"
    ),
    "clock": clock_after,
    "weekday": weekday_after,
    "give_away": lambda have, got, gave: sympy.Integer(have) + got - gave,
    "shopping": lambda count, price: f"{sympy.Integer(count) * price} dollars",
    "change": lambda count, price, paid: f"{paid - sympy.Integer(count) * price} dollars",
    "sharing": lambda total, children: sympy.Rational(total, children),
    "proportion": lambda first, cost, second: (
        f"{sympy.solve(sympy.Eq(x / second, sympy.Rational(cost, first)))[0]} dollars"
    ),
    "travel": lambda hours, speed: f"{sympy.Integer(hours) * speed} km",
    "ages": lambda age, older, years: sympy.Integer(age) + older + years,
}
POLYNOMIALS = {
    "expand": lambda a, b: (x + a) * (x + b),
}


def samples(kind, count=SAMPLES):
    rng = random.Random(f"samples of {kind}")
    return [KINDS[kind](rng) for _ in range(count)]


def test_every_kind_has_its_check():
    assert set(KINDS) == set(ANSWERS) | set(POLYNOMIALS)
    assert len(KINDS) >= 30


@pytest.mark.parametrize("kind", KINDS)
def test_sympy_confirms_the_answers(kind):
    for worked in samples(kind):
        if kind in POLYNOMIALS:
            assert is_written_as(POLYNOMIALS[kind](**worked.parameters), worked.answer), worked
        else:
            assert str(ANSWERS[kind](**worked.parameters)) == worked.answer, worked


@pytest.mark.parametrize("kind", KINDS)
def test_every_equation_among_the_steps_is_true(kind):
    for worked in samples(kind):
        for step in worked.steps:
            equation = re.fullmatch(r"(?:x = |.* is )?([\d +*/-]+) = ([\d +*/-]+)", step)
            remainder = re.fullmatch(r"(\d+) mod (\d+) = (\d+)", step)
            if equation:
                assert sympy.sympify(equation[1]) == sympy.sympify(equation[2]), worked
            elif remainder:
                assert sympy.Mod(int(remainder[1]), int(remainder[2])) == int(remainder[3]), worked
            else:
                assert " = " not in step or step.startswith("gcd("), worked


@pytest.mark.parametrize("kind", KINDS)
def test_the_parameters_are_all_that_a_problem_depends_on(kind):
    answers = {}
    for worked in samples(kind, 200):
        assert answers.setdefault(problem_id(kind, worked), worked.answer) == worked.answer
        numbers, shown = (set(map(int, re.findall(r"\d+", text))) for text in (str(worked.parameters), worked.question))
        assert numbers <= shown, worked


@pytest.mark.parametrize("kind", KINDS)
def test_solutions_are_short_and_end_with_the_answer(kind):
    for worked in samples(kind):
        assert worked.text == f"{worked.prompt} " + "\n".join([*worked.steps, f"Answer: {worked.answer}"])
        assert len(worked.text.removeprefix(worked.prompt)) < 150, worked


@pytest.mark.parametrize("rng_seed", [0, 1, 2])
def test_every_kind_has_problems_on_both_sides(rng_seed):
    for split in ("train", "val"):
        stream = problems(split, rng_seed, "test")
        drawn = [next(stream) for _ in range(6 * len(KINDS))]
        assert {kind for kind, _ in drawn} == set(KINDS)
        assert {is_held_out(problem_id(*item), rng_seed) for item in drawn} == {split == "val"}


def test_the_share_of_problems_held_out_is_as_stated():
    drawn = [problem_id(kind, worked) for kind in KINDS for worked in samples(kind, 300)]
    share = sum(is_held_out(problem, 0) for problem in set(drawn)) / len(set(drawn))
    assert share == pytest.approx(HELD_OUT_PROBLEMS, abs=0.015)


def test_questions_are_about_problems_that_train_has_in_no_wording():
    train = {item.group for item in documents("math", "train", 0, 1_000_000, 0.05)}
    by_text = {}
    stream = problems("val", 0, "questions")
    asked = questions("math", 0, 300)
    while len(by_text) < 1500 and not {item.full for item in asked} <= by_text.keys():
        kind, worked = next(stream)
        by_text.setdefault(worked.text, problem_id(kind, worked))
    assert {by_text[item.full] for item in asked} & train == set()
    assert len({by_text[item.full] for item in asked}) == 300
