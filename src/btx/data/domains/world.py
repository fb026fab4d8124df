"""A generated world: people, towns, animals, companies and novels, and one value for each of their properties.

Every fact (entity, relation, value) has exactly one right value, so a question about it has one gold answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

WORLD_SIZE = {"person": 36, "town": 18, "animal": 22, "company": 18, "novel": 20}
"""Entities of each kind: 358 facts, so that 300k training tokens state or ask each about 50 times."""

ONSETS = ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gr", "kr", "st", "tr"]
VOWELS = ["a", "e", "i", "o", "u"]
CODAS = ["l", "n", "r", "s", "th", "x", "ld", "nd", "rn", "sk"]
ENDINGS = {
    "first": ["a", "o", "an", "en", "il"],
    "last": CODAS,
    "town": ["ra", "mouth", "stead", "ville", "heim"],
    "animal": ["ock", "ling", "upi", "ard"],
    "company": ["ex", "co", "tron", "ium"],
    "country": ["ia", "land"],
    "river": ["ne", "le"],
}

PROFESSIONS = "baker carpenter dentist doctor farmer gardener lawyer painter pilot singer tailor teacher".split()
INSTRUMENTS = ["cello", "drum", "flute", "guitar", "harp", "piano", "trumpet", "violin"]
YEARS = [str(year) for year in range(1900, 1980, 5)]
FOODS = ["ants", "berries", "fish", "grass", "honey", "leaves", "mice", "nuts", "roots", "seeds", "snails", "worms"]
HABITATS = ["caves", "deserts", "forests", "lakes", "marshes", "meadows", "mountains", "rivers"]
COLOURS = ["black", "blue", "brown", "green", "grey", "orange", "purple", "red", "white", "yellow"]
PRODUCTS = "bicycles boats boots candles carpets clocks furniture glass lamps paper shirts tools".split()
SPECIALITIES = "bread cheese chocolate coal copper marble salt silk silver tea timber wine".split()
SETTINGS = "castle circus desert factory harbour hospital hotel island library monastery prison school".split()
ADJECTIVES = (
    "Ancient Bitter Broken Burning Crooked Distant Empty Endless Frozen Gentle Golden Hidden Hollow "
    "Lonely Northern Patient Quiet Restless Secret Silent Sleeping Stolen Velvet Winding"
).split()
NOUNS = (
    "Anchor Bridge Compass Crown Door Feather Garden Hour Key Lantern Letter Mirror Orchard Promise River "
    "Road Shadow Song Stairs Storm Thread Tower Voyage Winter"
).split()


@dataclass(frozen=True)
class Fact:
    """`entity` stands in `relation` to `value`, and to nothing else."""

    entity: str
    relation: str
    value: str


def make_world(rng_seed: int) -> list[Fact]:
    """All facts of the world of this rng seed, grouped by entity."""
    rng = random.Random(f"world/{rng_seed}")
    used: set[str] = set()
    people = [f"{_name(rng, 'first', used)} {_name(rng, 'last', used)}" for _ in range(WORLD_SIZE["person"])]
    towns = [_name(rng, "town", used) for _ in range(WORLD_SIZE["town"])]
    animals = [_name(rng, "animal", used).lower() for _ in range(WORLD_SIZE["animal"])]
    companies = [_name(rng, "company", used) for _ in range(WORLD_SIZE["company"])]
    adjectives, nouns = (rng.sample(words, WORLD_SIZE["novel"]) for words in (ADJECTIVES, NOUNS))
    novels = [f"The {adjective} {noun}" for adjective, noun in zip(adjectives, nouns, strict=True)]
    countries = [_name(rng, "country", used) for _ in range(6)]
    rivers = [_name(rng, "river", used) for _ in range(8)]
    relations = [
        (people, {"birthplace": towns, "profession": PROFESSIONS, "birth year": YEARS, "instrument": INSTRUMENTS}),
        (towns, {"country": countries, "river": rivers, "speciality": SPECIALITIES}),
        (animals, {"food": FOODS, "habitat": HABITATS, "colour": COLOURS}),
        (companies, {"product": PRODUCTS, "headquarters": towns, "founding year": YEARS}),
        (novels, {"author": people, "setting": SETTINGS}),
    ]
    return [
        Fact(entity, relation, rng.choice(values))
        for entities, properties in relations
        for entity in entities
        for relation, values in properties.items()
    ]


def _name(rng: random.Random, sort: str, used: set[str]) -> str:
    """A pronounceable name that is no part of another one."""
    while True:
        syllable = rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if sort != "last" else "")
        name = (syllable + rng.choice(ENDINGS[sort])).capitalize()
        if not any(name.lower() in other or other in name.lower() for other in used):
            used.add(name.lower())
            return name
