"""The shapes of what a run says of itself and has measured, as it is read again: manifest.json, evaluate/results.json
and documents.json, analyze/routing.json and tokens.json, mix/mix.json. They say what has to be there; more may be.
"""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic wants it below Python 3.12


class Manifest(TypedDict):
    """manifest.json."""

    command: str | list[str]
    versions: dict[str, str]
    recipe_sha256: str


class Answer(TypedDict):
    """A question of a task, with what the model said."""

    prompt: str
    output: str
    gold: str
    correct: bool


class TaskResult(TypedDict):
    """A model's score in a task."""

    examples: NotRequired[list[Answer]]


class ModelResult(TypedDict):
    """A model's row of results.json."""

    domains: NotRequired[dict[str, dict[str, Any]]]
    mixed: NotRequired[dict[str, Any]]
    tasks: NotRequired[dict[str, TaskResult]]
    mean_bits_per_byte: NotRequired[float | None]
    flops: NotRequired[float | None]
    tokens: NotRequired[int | None]
    hours: NotRequired[float | None]
    predicted: NotRequired[dict[str, Any]]
    matched: NotRequired[dict[str, Any]]


class Results(TypedDict):
    """results.json."""

    models: dict[str, ModelResult]


class Sizes(TypedDict):
    """UTF-8 bytes of every document."""

    domains: dict[str, list[float]]
    mixed: NotRequired[list[float]]


class Scores(Sizes):
    """Bits of every document, and whether each answer was right."""

    tasks: dict[str, list[float]]


class Documents(TypedDict):
    """evaluate/documents.json."""

    bytes: Sizes
    models: dict[str, Scores]


class DomainRouting(TypedDict):
    """A domain's entry in routing.json: shares of the load, of pairs, layer by layer."""

    load: list[list[float]]
    pairs: NotRequired[dict[str, list[float]]]


class Routing(TypedDict):
    """routing.json."""

    layers: int
    experts: list[str]
    domains: dict[str, DomainRouting]
    dead: NotRequired[list[list[int]]]


class Example(TypedDict):
    """A document token by token: its texts, and the experts and gate weights of each in every layer."""

    domain: str
    tokens: list[str]
    experts: list[list[list[int]]]
    gates: list[list[list[float]]]


class Tokens(TypedDict):
    """tokens.json."""

    layers: int
    experts: list[str]
    examples: list[Example]


class MixRecord(TypedDict):
    """mix.json."""

    experts: NotRequired[list[str]]
    diagnostics: NotRequired[dict[str, dict[str, Any]]]
    split: NotRequired[dict[str, Any] | None]
    blend: NotRequired[bool]
    paths: NotRequired[dict[str, str]]
    inputs: NotRequired[dict[str, Any]]
    history: NotRequired[list[Any]]
