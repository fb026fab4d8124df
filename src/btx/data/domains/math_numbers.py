"""Kinds of problems: divisors, primes, remainders, sequences, the median, counting."""

from __future__ import annotations

import math
import random

from btx.data.domains.math_registry import Drawn, kind

SMALL_PRIMES = [2, 3, 5, 7]


def smallest_prime_factor(n: int) -> int:
    """Of a number from 2 to 120."""
    return next((p for p in SMALL_PRIMES if n % p == 0), n)


@kind
def gcd(rng: random.Random) -> Drawn:
    factor = rng.randint(2, 5)
    a, b = sorted(factor * n for n in rng.sample(range(1, 7), 2))
    steps, x, y = [], b, a
    while y:
        steps.append(f"{x} mod {y} = {x % y}")
        x, y = y, x % y
    return (
        {"a": a, "b": b},
        [f"What is gcd({a}, {b})?", f"Find the greatest common divisor of {a} and {b}."],
        steps,
        str(math.gcd(a, b)),
    )


@kind
def prime(rng: random.Random) -> Drawn:
    n = rng.choice([2, rng.randint(3, 119), 2 * rng.randint(2, 59) + 1])
    p = smallest_prime_factor(n)
    step = f"no smaller prime divides {n}" if p == n else f"{n} = {p} * {n // p}"
    return (
        {"n": n},
        [f"Is {n} a prime number?", f"Is {n} prime?"],
        [step],
        "yes" if p == n else "no",
    )


@kind
def modular(rng: random.Random) -> Drawn:
    a, b, m = rng.randint(2, 9), rng.randint(2, 9), rng.randint(3, 9)
    total = a + b
    whole = total // m * m
    return (
        {"a": a, "b": b, "m": m},
        [f"What is ({a} + {b}) mod {m}?", f"Compute ({a} + {b}) mod {m}."],
        [f"{a} + {b} = {total}", f"{m} * {total // m} = {whole}", f"{total} - {whole} = {total % m}"],
        str(total % m),
    )


@kind
def arithmetic_sequence(rng: random.Random) -> Drawn:
    start, step = rng.randint(1, 9), rng.randint(2, 9)
    terms = [start + i * step for i in range(4)]
    listed = ", ".join(map(str, terms))
    return (
        {"terms": terms},
        [f"What comes next: {listed}?", f"Find the next number of {listed}."],
        [f"{terms[1]} - {terms[0]} = {step}", f"{terms[3]} + {step} = {terms[3] + step}"],
        str(terms[3] + step),
    )


@kind
def median(rng: random.Random) -> Drawn:
    numbers = rng.sample(range(1, 10), 3)
    ordered = sorted(numbers)
    listed = ", ".join(map(str, numbers))
    return (
        {"numbers": numbers},
        [f"What is the median of {listed}?", f"Find the median: {listed}."],
        [f"in order: {', '.join(map(str, ordered))}", f"the middle one is {ordered[1]}"],
        str(ordered[1]),
    )


@kind
def choices(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    first, second = rng.choice([("shirts", "hats"), ("soups", "desserts"), ("roads", "bridges"), ("keys", "doors")])
    return (
        {"a": a, "b": b},
        [
            f"How many pairs can be made of {a} {first} and {b} {second}?",
            f"There are {a} {first} and {b} {second}. In how many ways can one of each be chosen?",
        ],
        [f"{a} * {b} = {a * b}"],
        str(a * b),
    )
