"""Kinds of problems: whole numbers, comparing, rounding, fractions, percent."""

from __future__ import annotations

import random
from math import gcd

from btx.data.domains.math_registry import Drawn, kind

PLACES = ["hundreds", "tens", "ones"]


@kind
def addition(rng: random.Random) -> Drawn:
    a, b, c = (rng.randint(1, 9) for _ in range(3))
    return (
        {"a": a, "b": b, "c": c},
        [f"What is {a} + {b} + {c}?", f"Compute {a} + {b} + {c}."],
        [f"{a} + {b} = {a + b}", f"{a + b} + {c} = {a + b + c}"],
        str(a + b + c),
    )


@kind
def subtraction(rng: random.Random) -> Drawn:
    b = rng.randint(1, 9)
    a = b + rng.randint(1, 9)
    return (
        {"a": a, "b": b},
        [f"What is {a} - {b}?", f"Compute {a} - {b}."],
        [f"{a} - {b} = {a - b}"],
        str(a - b),
    )


@kind
def multiplication(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return (
        {"a": a, "b": b},
        [f"What is {a} * {b}?", f"Compute {a} * {b}."],
        [f"{a} * {b} = {a * b}"],
        str(a * b),
    )


@kind
def remainder(rng: random.Random) -> Drawn:
    b = rng.randint(3, 9)
    a = rng.randint(b + 1, 5 * b - 1)
    whole = a // b
    return (
        {"a": a, "b": b},
        [f"What is the remainder of {a} divided by {b}?", f"Divide {a} by {b}. What is left over?"],
        [f"{b} * {whole} = {b * whole}", f"{a} - {b * whole} = {a % b}"],
        str(a % b),
    )


@kind
def order_of_operations(rng: random.Random) -> Drawn:
    a, b, c = rng.randint(1, 9), rng.randint(2, 9), rng.randint(2, 9)
    return (
        {"a": a, "b": b, "c": c},
        [f"What is {a} + {b} * {c}?", f"Compute {a} + {b} * {c}."],
        [f"{b} * {c} = {b * c}", f"{a} + {b * c} = {a + b * c}"],
        str(a + b * c),
    )


@kind
def compare(rng: random.Random) -> Drawn:
    a, b = rng.sample(range(10, 100), 2)
    larger, smaller = max(a, b), min(a, b)
    reason = (
        f"{larger // 10} tens are more than {smaller // 10} tens"
        if larger // 10 > smaller // 10
        else f"{larger % 10} ones are more than {smaller % 10} ones"
    )
    return (
        {"a": a, "b": b},
        [f"Which number is larger, {a} or {b}?", f"Find the larger of {a} and {b}."],
        [reason],
        str(larger),
    )


@kind
def largest(rng: random.Random) -> Drawn:
    numbers = rng.sample(range(1, 10), 4)
    steps = [f"the larger of {max(numbers[:i])} and {numbers[i]} is {max(numbers[: i + 1])}" for i in (1, 2, 3)]
    listed = ", ".join(map(str, numbers))
    return (
        {"numbers": numbers},
        [f"What is the largest of {listed}?", f"Find the largest number: {listed}."],
        steps,
        str(max(numbers)),
    )


@kind
def rounding(rng: random.Random) -> Drawn:
    n = rng.randint(11, 99)
    down = n // 10 * 10
    rounded = down + 10 if n % 10 >= 5 else down
    direction = "up" if n % 10 >= 5 else "down"
    return (
        {"n": n},
        [f"Round {n} to the nearest ten.", f"What is {n} rounded to the nearest ten?"],
        [f"the last digit is {n % 10}, so round {direction}"],
        str(rounded),
    )


@kind
def place_value(rng: random.Random) -> Drawn:
    n, place = rng.randint(100, 999), rng.choice(PLACES)
    digits = str(n)
    listed = ", ".join(f"{digit} {name}" for digit, name in zip(digits, PLACES, strict=True))
    return (
        {"n": n, "place": place},
        [f"Which digit of {n} is in the {place} place?", f"What is the {place} digit of {n}?"],
        [f"{n} has {listed}"],
        digits[PLACES.index(place)],
    )


@kind
def fraction_sum(rng: random.Random) -> Drawn:
    d = rng.randint(4, 9)
    a = rng.randint(1, d - 2)
    b = rng.choice([n for n in range(1, d - a) if gcd(a + n, d) == 1])
    return (
        {"a": a, "b": b, "d": d},
        [f"What is {a}/{d} + {b}/{d}?", f"Compute {a}/{d} + {b}/{d}."],
        [f"{a} + {b} = {a + b}", f"the denominator stays {d}"],
        f"{a + b}/{d}",
    )


@kind
def fraction_of(rng: random.Random) -> Drawn:
    q, unit = rng.randint(2, 5), rng.randint(2, 9)
    p = rng.choice([n for n in range(1, q) if gcd(n, q) == 1])
    return (
        {"p": p, "q": q, "n": q * unit},
        [f"What is {p}/{q} of {q * unit}?", f"Find {p}/{q} of {q * unit}."],
        [f"{q * unit} / {q} = {unit}", f"{p} * {unit} = {p * unit}"],
        str(p * unit),
    )


@kind
def percent(rng: random.Random) -> Drawn:
    tens, n = rng.choice([1, 2, 3, 5]), 10 * rng.randint(2, 9)
    tenth = n // 10
    steps = [f"10 percent of {n} is {n} / 10 = {tenth}"]
    if tens > 1:
        steps.append(f"{tens} * {tenth} = {tens * tenth}")
    return (
        {"percent": 10 * tens, "n": n},
        [f"What is {10 * tens} percent of {n}?", f"Find {10 * tens} percent of {n}."],
        steps,
        str(tens * tenth),
    )
