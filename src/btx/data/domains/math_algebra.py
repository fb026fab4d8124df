"""Kinds of problems: equations, polynomials, shapes, units, time."""

from __future__ import annotations

import random

from btx.data.domains.math_registry import Drawn, kind

UNITS = [
    ("metres", "centimetres", 100),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("centimetres", "millimetres", 10),
    ("kilometres", "metres", 1000),
    ("kilograms", "grams", 1000),
    ("years", "months", 12),
    ("dozens", "pieces", 12),
]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


@kind
def linear_shift(rng: random.Random) -> Drawn:
    x, a = rng.randint(1, 9), rng.randint(1, 9)
    return (
        {"a": a, "b": x + a},
        [f"Solve x + {a} = {x + a}.", f"Find x when x + {a} = {x + a}."],
        [f"x = {x + a} - {a} = {x}"],
        str(x),
    )


@kind
def linear(rng: random.Random) -> Drawn:
    x, a, b = rng.randint(1, 9), rng.randint(2, 9), rng.randint(1, 9)
    c = a * x + b
    return (
        {"a": a, "b": b, "c": c},
        [f"Solve {a}x + {b} = {c}.", f"Find x when {a}x + {b} = {c}."],
        [f"{c} - {b} = {a * x}", f"{a * x} / {a} = {x}"],
        str(x),
    )


@kind
def expand(rng: random.Random) -> Drawn:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return (
        {"a": a, "b": b},
        [f"Expand (x + {a})(x + {b}).", f"Multiply out (x + {a})(x + {b})."],
        [f"{a} + {b} = {a + b}", f"{a} * {b} = {a * b}"],
        f"x^2 + {a + b}x + {a * b}",
    )


@kind
def perimeter(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return (
        {"a": a, "b": b},
        [
            f"A rectangle has sides {a} and {b}. What is its perimeter?",
            f"What is the perimeter of a rectangle of {a} by {b}?",
        ],
        [f"{a} + {b} = {a + b}", f"2 * {a + b} = {2 * (a + b)}"],
        str(2 * (a + b)),
    )


@kind
def area(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return (
        {"a": a, "b": b},
        [f"A rectangle has sides {a} and {b}. What is its area?", f"What is the area of a rectangle of {a} by {b}?"],
        [f"{a} * {b} = {a * b}"],
        str(a * b),
    )


@kind
def triangle_area(rng: random.Random) -> Drawn:
    base, height = 2 * rng.randint(1, 4), rng.randint(2, 9)
    return (
        {"base": base, "height": height},
        [
            f"A triangle has base {base} and height {height}. What is its area?",
            f"What is the area of a triangle with base {base} and height {height}?",
        ],
        [f"{base} * {height} = {base * height}", f"{base * height} / 2 = {base * height // 2}"],
        str(base * height // 2),
    )


@kind
def unit_conversion(rng: random.Random) -> Drawn:
    large, small, factor = rng.choice(UNITS)
    n = rng.randint(2, 9)
    return (
        {"from": large, "to": small, "n": n},
        [f"How many {small} are {n} {large}?", f"Convert {n} {large} to {small}."],
        [f"{n} * {factor} = {n * factor}"],
        f"{n * factor} {small}",
    )


@kind
def clock(rng: random.Random) -> Drawn:
    hour, start, duration = rng.randint(1, 10), 5 * rng.randint(0, 11), 5 * rng.randint(1, 11)
    total = start + duration
    steps = [f"{start} + {duration} = {total}"]
    if total >= 60:
        steps += [f"{total} - 60 = {total - 60}", f"{hour} + 1 = {hour + 1}"]
    return (
        {"hour": hour, "minute": start, "duration": duration},
        [
            f"It is {hour}:{start:02}. What time is it in {duration} minutes?",
            f"What time is {duration} minutes after {hour}:{start:02}?",
        ],
        steps,
        f"{hour + total // 60}:{total % 60:02}",
    )


@kind
def weekday(rng: random.Random) -> Drawn:
    today, days = rng.randrange(7), rng.randint(1, 20)
    rest = days % 7
    passing = [WEEKDAYS[(today + i) % 7] for i in range(rest + 1)]
    return (
        {"today": WEEKDAYS[today], "days": days},
        [
            f"Today is {passing[0]}. What day is it in {days} days?",
            f"What day comes {days} days after {passing[0]}?",
        ],
        [f"{days} mod 7 = {rest}", ", ".join(passing)],
        passing[-1],
    )
