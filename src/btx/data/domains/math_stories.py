"""Kinds of problems told with people and things."""

from __future__ import annotations

import random

from btx.data.domains.math_registry import NAMES, THINGS, Drawn, kind


@kind
def give_away(rng: random.Random) -> Drawn:
    have, got, gave = rng.randint(3, 9), rng.randint(2, 9), rng.randint(1, 5)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    total = have + got
    return (
        {"have": have, "got": got, "gave": gave},
        [
            f"{name} has {have} {thing}, gets {got} more and gives {gave} away. How many {thing} are left?",
            f"{name} had {have} {thing}, found {got} and lost {gave}. How many {thing} does {name} have now?",
        ],
        [f"{have} + {got} = {total}", f"{total} - {gave} = {total - gave}"],
        str(total - gave),
    )


@kind
def shopping(rng: random.Random) -> Drawn:
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    return (
        {"count": count, "price": price},
        [
            f"{name} buys {count} {thing} at {price} dollars each. What is the cost?",
            f"{count} {thing} cost {price} dollars each. How much does {name} pay?",
        ],
        [f"{count} * {price} = {count * price}"],
        f"{count * price} dollars",
    )


@kind
def change(rng: random.Random) -> Drawn:
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    cost = count * price
    paid = (cost // 10 + rng.randint(1, 2)) * 10
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    return (
        {"count": count, "price": price, "paid": paid},
        [
            f"{name} buys {count} {thing} at {price} dollars each and pays with {paid} dollars. What is the change?",
            f"{count} {thing} cost {price} dollars each. {name} gives {paid} dollars. How much does {name} get back?",
        ],
        [f"{count} * {price} = {cost}", f"{paid} - {cost} = {paid - cost}"],
        f"{paid - cost} dollars",
    )


@kind
def sharing(rng: random.Random) -> Drawn:
    children, each = rng.randint(2, 9), rng.randint(2, 9)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    return (
        {"total": children * each, "children": children},
        [
            f"{name} shares {children * each} {thing} among {children} children. How many does each get?",
            f"{name} puts {children * each} {thing} into {children} equal bags. How many are in each?",
        ],
        [f"{children * each} / {children} = {each}"],
        str(each),
    )


@kind
def proportion(rng: random.Random) -> Drawn:
    price = rng.randint(2, 9)
    first, second = rng.sample(range(2, 10), 2)
    thing = rng.choice(THINGS)
    return (
        {"first": first, "cost": first * price, "second": second},
        [
            f"{first} {thing} cost {first * price} dollars. How much do {second} {thing} cost?",
            f"If {first} {thing} cost {first * price} dollars, what do {second} cost?",
        ],
        [f"{first * price} / {first} = {price}", f"{second} * {price} = {second * price}"],
        f"{second * price} dollars",
    )


@kind
def travel(rng: random.Random) -> Drawn:
    hours, speed = rng.randint(2, 9), rng.randint(2, 9)
    name = rng.choice(NAMES)
    return (
        {"hours": hours, "speed": speed},
        [
            f"{name} travels {hours} hours at {speed} km per hour. How far does {name} get?",
            f"How far does {name} get in {hours} hours at {speed} km per hour?",
        ],
        [f"{hours} * {speed} = {hours * speed}"],
        f"{hours * speed} km",
    )


@kind
def ages(rng: random.Random) -> Drawn:
    age, older, years = rng.randint(3, 9), rng.randint(2, 9), rng.randint(2, 9)
    first, second = rng.sample(NAMES, 2)
    return (
        {"age": age, "older": older, "years": years},
        [
            f"{first} is {age}. {second} is {older} years older. How old is {second} in {years} years?",
            f"{second} is {older} years older than {first}, who is {age}. "
            f"What is the age of {second} in {years} years?",
        ],
        [f"{age} + {older} = {age + older}", f"{age + older} + {years} = {age + older + years}"],
        str(age + older + years),
    )
