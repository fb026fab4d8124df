"""The shapes of what a run says of itself and has measured, as it is read again: recipe.yaml, manifest.json,
evaluate/results.json and documents.json, analyze/routing.json, align.json and tokens.json, mix/mix.json. They say what
has to be there; more may be.
"""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic wants it below Python 3.12


class DataSection(TypedDict):
    """A recipe's `data`, as far as the report reads it."""

    general: NotRequired[str | None]


class TrainSection(TypedDict):
    """A recipe's `train`."""

    domains: NotRequired[list[str]]


class MixSection(TypedDict):
    """A recipe's `mix`."""

    router: NotRequired[str]
    top_k: NotRequired[int]


class ResolvedRecipe(TypedDict):
    """recipe.yaml."""

    data: NotRequired[DataSection]
    train: NotRequired[TrainSection]
    mix: NotRequired[MixSection]


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
    learning_bits_per_byte: NotRequired[float | None]
    """Mean over the domains that have a branch, where others have none."""
    keeping_bits_per_byte: NotRequired[float | None]
    """Mean over the domains without a branch."""
    flops: NotRequired[float | None]
    tokens: NotRequired[int | None]
    hours: NotRequired[float | None]
    predicted: NotRequired[dict[str, Any]]
    predicted_gain: NotRequired[dict[str, Any] | None]
    """btx: what was predicted of dense minus btx."""
    matched: NotRequired[dict[str, Any]]
    other: NotRequired[dict[str, str]]
    """Of a model that is not the run's: its `path`."""


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


class Interval(TypedDict):
    """A statistic with the bounds of its 95 % interval, documents drawn anew (bootstrap)."""

    value: float
    low: float
    high: float


class Bounds(TypedDict):
    """[low, high] of the 95 % intervals of statistics that are plain numbers beside."""

    similarity: list[list[list[float]]]
    positions: dict[str, list[list[list[float]]]]
    classes: dict[str, list[list[list[float]]]]


class Statistics(TypedDict):
    """What the routing says as a whole."""

    load: dict[str, list[list[Interval]]]
    """Domain → layer → expert."""
    pairs: NotRequired[dict[str, dict[str, list[Interval]]]]
    """Domain → pair of experts, as in the domain's `pairs` → layer by layer, share of the tokens."""
    specialisation: list[Interval]
    """Mutual information of domain and first expert over the domain's entropy, 0 to 1, layer by layer; empty where
    there is one domain only."""
    similarity: list[list[float]]
    """Of two layers: mutual information of their first experts over the mean of their entropies (L, L)."""
    positions: dict[str, list[list[float]]]
    """"0-15", "16-63" ... of the document → layer → share of each expert."""
    classes: dict[str, list[list[float]]]
    """Class of the token (word, number, punctuation, space, ...) → layer → share of each expert."""
    bounds: NotRequired[Bounds]


class UsedFor(TypedDict):
    """What an expert is used for."""

    tokens: list[list[Any]]
    """Tokens it gets more often than an even load would say, each [text, share of its occurrences at which the expert
    is chosen (mean over layers; of an even load K / E), occurrences]."""
    classes: dict[str, float]
    """Class of the token → share of the tokens the expert gets."""


class Lag(TypedDict):
    """How fast the routing follows a change of domain inside a document."""

    positions: list[int]
    """Tokens since the change; negative before it."""
    old: list[float]
    """Share of the load of the old domain's expert, mean over layers and documents."""
    new: list[float]
    documents: int


class Kept(TypedDict):
    """Quality with some of the experts only, dropped one by one, the least used first."""

    experts: list[str]
    domains: dict[str, float]
    """Bits per byte."""
    mean: float


Loads = dict[str, list[list[float]]]
"""Domain → layer → share of each expert."""


class Routing(TypedDict):
    """routing.json; `loads` comes from evaluate/shown.json."""

    layers: int
    experts: list[str]
    domains: dict[str, DomainRouting]
    dead: NotRequired[list[list[int]]]
    model: NotRequired[str]
    """Of `btx analyze MODEL`: what was analysed."""
    dropped: NotRequired[list[str]]
    """Experts that no token could use (`--without`)."""
    statistics: NotRequired[Statistics]
    used_for: NotRequired[dict[str, UsedFor]]
    lag: NotRequired[Lag]
    kept: NotRequired[list[Kept]]
    loads: NotRequired[dict[str, Loads]]
    """Models with these experts (mix, btx, an aligned one) → their load, all on the same text: before and after."""


class RoutingShift(TypedDict):
    """What aligning a model has changed in where a domain's held-out text goes; each list has a value a layer."""

    moved: list[float]
    """Share of the text tokens whose first expert is another one than before."""
    distance: list[float]
    """Half the sum over experts of the difference between their shares before and after, 0 to 1."""


class AlignedRouting(TypedDict):
    """analyze/align.json, of a run whose recipe has `align`."""

    before: str
    """Model (a name in results.json) that the others are compared with: btx."""
    models: dict[str, dict[str, RoutingShift]]
    """Model of `align` (sft, dpo) → domain."""


class Route(TypedDict):
    """The experts and gate weights of each token of a text, in every layer."""

    experts: list[list[list[int]]]
    gates: list[list[list[float]]]


class Example(Route):
    """A document token by token: its texts, and how they are routed."""

    domain: str
    tokens: list[str]
    document: NotRequired[str]
    """Name of the document, made from its tokens."""
    losses: NotRequired[dict[str, list[float]]]
    """Model (seed, expert/D, mix, btx, baselines) → bits of every token, read as for bits per byte; from
    evaluate/shown.json."""
    routes: NotRequired[dict[str, Route]]
    """Other MoE models of the run (mix, upcycling, an aligned one) → how they route it; from evaluate/shown.json."""


class ShownAnswer(Route):
    """A question of a domain, what models answered, and the tokens of the run's model as an example's."""

    domain: str
    task: NotRequired[str]
    prompt: str
    gold: NotRequired[str]
    answers: dict[str, str]
    """Model (btx, seed, the domain's expert) → its answer."""
    correct: NotRequired[dict[str, bool]]
    tokens: list[str]


class Shown(TypedDict):
    """evaluate/shown.json: what the evaluation adds to tokens.json and routing.json, as it reads every model."""

    losses: dict[str, dict[str, list[float]]]
    """Document → model → bits of every token."""
    answers: list[ShownAnswer]
    loads: dict[str, Loads]
    routes: NotRequired[dict[str, dict[str, Route]]]
    """Document → model."""


class Tokens(TypedDict):
    """tokens.json; `answers` and the examples' `losses` come from evaluate/shown.json."""

    layers: int
    experts: list[str]
    examples: list[Example]
    answers: NotRequired[list[ShownAnswer]]


class Oracle(TypedDict):
    """oracle.json: each domain's best model before the finetuning against the mix, in bits per byte."""

    domains: dict[str, dict[str, Any]]
    mean_gap: float
    divergence: dict[str, float]
    """Percent of the seed model's bits that each expert has saved at home."""
    predicted_gain: float
    """Percent over the best single expert."""
    text: NotRequired[dict[str, str]]
    """Domain → hash of its data, as they were read for it."""


class MixRecord(TypedDict):
    """mix.json."""

    experts: NotRequired[list[str]]
    diagnostics: NotRequired[dict[str, dict[str, Any]]]
    split: NotRequired[dict[str, Any] | None]
    blend: NotRequired[bool]
    paths: NotRequired[dict[str, str]]
    inputs: NotRequired[dict[str, Any]]
    history: NotRequired[list[Any]]
