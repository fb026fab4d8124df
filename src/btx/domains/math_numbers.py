"""Kinds of problems: divisors, primes, remainders, bases, sequences, averages, counting."""

from __future__ import annotations

import random
from math import gcd, lcm

from btx.domains.math_registry import Worked, kind

SMALL_PRIMES = [2, 3, 5, 7]


def smallest_prime_factor(n: int) -> int:
    """Of a number from 2 to 120."""
    return next((p for p in SMALL_PRIMES if n % p == 0), n)


COMPOSITES = [n for n in range(10, 121) if smallest_prime_factor(n) < n]


@kind("gcd")
def greatest_common_divisor(rng: random.Random) -> Worked:
    factor = rng.randint(2, 9)
    a, b = sorted(factor * n for n in rng.sample(range(1, 9), 2))
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


@kind("lcm")
def least_common_multiple(rng: random.Random) -> Worked:
    a, b = sorted(rng.sample(range(2, 16), 2))
    multiples = range(b, lcm(a, b) + 1, b)
    return Worked(
        {"a": a, "b": b},
        rng.choice([f"What is lcm({a}, {b})?", f"Find the least common multiple of {a} and {b}."]),
        [f"multiples of {b}: {', '.join(map(str, multiples))}", f"{lcm(a, b)} / {a} = {lcm(a, b) // a}"],
        str(lcm(a, b)),
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


@kind("factorisation")
def factorisation(rng: random.Random) -> Worked:
    n = rng.choice(COMPOSITES)
    steps, factors, rest = [], [], n
    while (p := smallest_prime_factor(rest)) < rest:
        steps.append(f"{rest} = {p} * {rest // p}")
        factors.append(p)
        rest //= p
    return Worked(
        {"n": n},
        rng.choice([f"Write {n} as a product of primes.", f"Factor {n} into primes."]),
        steps,
        " * ".join(map(str, [*factors, rest])),
    )


@kind("modular")
def modular(rng: random.Random) -> Worked:
    a, b, m = rng.randint(2, 19), rng.randint(2, 19), rng.randint(3, 9)
    total = a + b
    whole = total // m * m
    return Worked(
        {"a": a, "b": b, "m": m},
        rng.choice([f"What is ({a} + {b}) mod {m}?", f"Compute ({a} + {b}) mod {m}."]),
        [f"{a} + {b} = {total}", f"{m} * {total // m} = {whole}", f"{total} - {whole} = {total % m}"],
        str(total % m),
    )


@kind("to_binary")
def to_binary(rng: random.Random) -> Worked:
    n = rng.randint(4, 127)
    steps, rest = [], n
    while rest:
        steps.append(f"{rest} = 2 * {rest // 2} + {rest % 2}")
        rest //= 2
    return Worked({"n": n}, rng.choice([f"Write {n} in base 2.", f"What is {n} in binary?"]), steps, f"{n:b}")


@kind("from_binary")
def from_binary(rng: random.Random) -> Worked:
    n = rng.randint(4, 127)
    powers = [2**i for i in range(n.bit_length() - 1, -1, -1) if n >> i & 1]
    return Worked(
        {"digits": f"{n:b}"},
        rng.choice([f"Write the binary number {n:b} in base 10.", f"Which number is {n:b} in binary?"]),
        [f"{' + '.join(map(str, powers))} = {n}"],
        str(n),
    )


@kind("arithmetic_sequence")
def arithmetic_sequence(rng: random.Random) -> Worked:
    start, step = rng.randint(1, 30), rng.randint(2, 9)
    terms = [start + i * step for i in range(4)]
    listed = ", ".join(map(str, terms))
    return Worked(
        {"terms": terms},
        rng.choice([f"What comes next: {listed}?", f"Find the next number of {listed}."]),
        [f"{terms[1]} - {terms[0]} = {step}", f"{terms[3]} + {step} = {terms[3] + step}"],
        str(terms[3] + step),
    )


@kind("geometric_sequence")
def geometric_sequence(rng: random.Random) -> Worked:
    start, ratio, length = rng.randint(1, 25), rng.choice([2, 2, 3, 10]), rng.choice([3, 4])
    terms = [start * ratio**i for i in range(length)]
    listed = ", ".join(map(str, terms))
    return Worked(
        {"terms": terms},
        rng.choice([f"Each number is a fixed multiple of the one before. What comes next: {listed}?",
                    f"Find the next number of the geometric sequence {listed}."]),
        [f"{terms[1]} / {terms[0]} = {ratio}", f"{ratio} * {terms[-1]} = {ratio * terms[-1]}"],
        str(ratio * terms[-1]),
    )


@kind("mean")
def mean(rng: random.Random) -> Worked:
    average, d, e = rng.randint(6, 20), rng.randint(0, 5), rng.randint(0, 5)
    numbers = [average - d, average + d + e, average - e]
    rng.shuffle(numbers)
    x, y, z = numbers
    return Worked(
        {"numbers": numbers},
        rng.choice([f"What is the mean of {x}, {y}, {z}?", f"Find the average of {x}, {y}, {z}."]),
        [f"{x} + {y} = {x + y}", f"{x + y} + {z} = {x + y + z}", f"{x + y + z} / 3 = {average}"],
        str(average),
    )


@kind("median")
def median(rng: random.Random) -> Worked:
    numbers = rng.sample(range(1, 30), 5)
    ordered = sorted(numbers)
    listed = ", ".join(map(str, numbers))
    return Worked(
        {"numbers": numbers},
        rng.choice([f"What is the median of {listed}?", f"Find the median: {listed}."]),
        [f"in order: {', '.join(map(str, ordered))}", f"the middle one is {ordered[2]}"],
        str(ordered[2]),
    )


@kind("choices")
def choices(rng: random.Random) -> Worked:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    first, second = rng.choice([("shirts", "hats"), ("soups", "desserts"), ("roads", "bridges"), ("keys", "doors")])
    return Worked(
        {"a": a, "b": b},
        rng.choice([f"How many pairs can be made of {a} {first} and {b} {second}?",
                    f"There are {a} {first} and {b} {second}. In how many ways can one of each be chosen?"]),
        [f"{a} * {b} = {a * b}"],
        str(a * b),
    )
