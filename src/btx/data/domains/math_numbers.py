"""Kinds of problems: divisors, primes, remainders, sequences, the median, counting."""

from __future__ import annotations

import random
from math import gcd

from btx.data.domains.math_registry import Worked, kind

SMALL_PRIMES = [2, 3, 5, 7]


def smallest_prime_factor(n: int) -> int:
    """Of a number from 2 to 120."""
    return next((p for p in SMALL_PRIMES if n % p == 0), n)


@kind("gcd")
def greatest_common_divisor(rng: random.Random) -> Worked:
    factor = rng.randint(2, 5)
    a, b = sorted(factor * n for n in rng.sample(range(1, 7), 2))
    steps, x, y = [], b, a
    while y:
        steps.append(f"{x} mod {y} = {x % y}")
        x, y = y, x % y
    return Worked(
        {"a": a, "b": b},
        rng.choice([f"What is gcd({a}, {b})?", f"Find the greatest common divisor of {a} and {b}."]),
        steps,
        str(gcd(a, b)),
    )


@kind("prime")
def prime(rng: random.Random) -> Worked:
    n = rng.choice([2, rng.randint(3, 119), 2 * rng.randint(2, 59) + 1])
    p = smallest_prime_factor(n)
    step = f"no smaller prime divides {n}" if p == n else f"{n} = {p} * {n // p}"
    return Worked(
        {"n": n},
        rng.choice([f"Is {n} a prime number?", f"Is {n} prime?"]),
        [step],
        "yes" if p == n else "no",
    )


@kind("modular")
def modular(rng: random.Random) -> Worked:
    a, b, m = rng.randint(2, 9), rng.randint(2, 9), rng.randint(3, 9)
    total = a + b
    whole = total // m * m
    return Worked(
        {"a": a, "b": b, "m": m},
        rng.choice([f"What is ({a} + {b}) mod {m}?", f"Compute ({a} + {b}) mod {m}."]),
        [f"{a} + {b} = {total}", f"{m} * {total // m} = {whole}", f"{total} - {whole} = {total % m}"],
        str(total % m),
    )


@kind("arithmetic_sequence")
def arithmetic_sequence(rng: random.Random) -> Worked:
    start, step = rng.randint(1, 9), rng.randint(2, 9)
    terms = [start + i * step for i in range(4)]
    listed = ", ".join(map(str, terms))
    return Worked(
        {"terms": terms},
        rng.choice([f"What comes next: {listed}?", f"Find the next number of {listed}."]),
        [f"{terms[1]} - {terms[0]} = {step}", f"{terms[3]} + {step} = {terms[3] + step}"],
        str(terms[3] + step),
    )


@kind("median")
def median(rng: random.Random) -> Worked:
    numbers = rng.sample(range(1, 10), 3)
    ordered = sorted(numbers)
    listed = ", ".join(map(str, numbers))
    return Worked(
        {"numbers": numbers},
        rng.choice([f"What is the median of {listed}?", f"Find the median: {listed}."]),
        [f"in order: {', '.join(map(str, ordered))}", f"the middle one is {ordered[1]}"],
        str(ordered[1]),
    )


@kind("choices")
def choices(rng: random.Random) -> Worked:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    first, second = rng.choice([("shirts", "hats"), ("soups", "desserts"), ("roads", "bridges"), ("keys", "doors")])
    return Worked(
        {"a": a, "b": b},
        rng.choice(
            [
                f"How many pairs can be made of {a} {first} and {b} {second}?",
                f"There are {a} {first} and {b} {second}. In how many ways can one of each be chosen?",
            ]
        ),
        [f"{a} * {b} = {a * b}"],
        str(a * b),
    )
