"""What a sweep runs: combinations of named variants and varied values, times rng seeds.

`btx sweep demo finetune.learning_rate=1e-3,2e-3 mix.top_k=1,2` has four variants. Every combination of a variant and an
rng seed is an ordinary recipe with an ordinary run folder, `<sweep folder>/<variant>/rng-<rng seed>`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

from btx.errors import RecipeError, UserError
from btx.recipe.derived import SECTIONS
from btx.recipe.loading import inline_yaml, load_recipe, read_sweep
from btx.recipe.schema import Recipe, Sweep
from btx.recipe.training import Training
from btx.recipe.yaml_positions import YamlSyntaxError, read_yaml
from btx.run_folder.folder import RunFolder
from btx.run_folder.graph import Stage
from btx.run_folder.stages_of_recipe import build_graph
from btx.run_folder.threads import jobs_at_once, processors
from btx.training.schedule import steps_before_decay

OWN_KEYS = {
    "rng_seed": "the rng seeds are given by --rng-seeds",
    "run": "the run folders are named after the variants",
    "name": "the name is the sweep's",
    "extends": "a sweep compares variants on the same data",
    "sweep": "a sweep holds no sweeps",
}
"""Keys that cannot vary, and why."""
LONGEST_VALUE = 40
"""Characters of a value in a variant's name."""


OF_A_TRUNK = {"batch_tokens", "learning_rate", "warmup_steps"}
"""What follows from a training's tokens where the recipe leaves it out, and has to be equal on a trunk."""
OWN_FILES = ("sweep.json", "sweep.md", "sweep.svg")
"""What a sweep writes beside its variants' folders."""
MOST_VARIANTS = 1000


@dataclass(frozen=True)
class Variant:
    """One combination of settings."""

    label: str
    settings: dict[str, Any]
    """Dotted key → value, of what this variant sets."""

    @property
    def overrides(self) -> list[str]:
        """The settings as overrides of the recipe."""
        return [f"{key}={inline_yaml(value)}" for key, value in self.settings.items()]


def run_name(variant: str, rng_seed: int) -> str:
    """What messages call a run."""
    return f"{variant}, rng seed {rng_seed}"


@dataclass(frozen=True)
class SweepRun:
    """One variant with one rng seed: a recipe of its own."""

    variant: Variant
    rng_seed: int
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.run_folder)

    @property
    def name(self) -> str:
        """What messages call it."""
        return run_name(self.variant.label, self.rng_seed)

    @cached_property
    def run_folder(self) -> RunFolder:
        """The run, there or still to come, with the graph of its stages as it is when first asked for."""
        return RunFolder(self.folder, self.recipe)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The run's stages, with the hashes that say what can be shared."""
        return self.run_folder.graph.stages

    def unfinished(self) -> list[Stage]:
        """The stages that are not done."""
        return [stage for stage in self.stages if self.run_folder.state(stage) != "done"]


@dataclass(frozen=True)
class SweepPlan:
    """Everything a sweep will run, in order: rng seed by rng seed, so that the variants can be compared early, and what
    others go on from first."""

    name: str
    folder: Path
    variants: list[Variant]
    rng_seeds: list[int]
    models: list[str] | None
    """Models the table shows; None for all."""
    runs: list[SweepRun] = field(default_factory=list)


def plan_sweep(
    name: str, arguments: Sequence[str], *, rng_seeds: int | None = None, models: Sequence[str] | None = None,
    jobs: int = 1, check: Callable[[Recipe], object] = lambda recipe: None,
) -> SweepPlan:  # fmt: skip
    """Read the recipe of every combination; nothing is written.

    Args:
        name: packaged recipe, file or run folder; its `sweep` section is what is run if no argument varies anything.
        arguments: `key=value` for all variants, `key=a,b,c` to vary (see `split_values`).
        rng_seeds: how many; default: the sweep section's, or 3.
        models: models the table shows; default: the sweep section's, or all.
        jobs: runs at a time; with several, they share the processors unless launch.threads is given.
        check: called with each run's recipe; may raise `UserError`.

    Raises:
        UserError: a recipe or an argument that cannot be run, each named with its variant.
    """
    fixed, varied = _arguments(arguments)
    recipe_name, section, wrong = _section(name, fixed)
    count = rng_seeds if rng_seeds is not None else section.rng_seeds
    if count < 1:
        raise UserError(f"--rng-seeds is {count}; at least 1")
    set_aside = {override.partition("=")[0].strip() for override in fixed}
    axes = {key: values for key, values in (section.vary | varied).items() if key not in set_aside}
    for key in [*section.vary, *(key for settings in section.variants.values() for key in settings)]:
        if (first := key.split(".")[0]) in OWN_KEYS:
            raise UserError(f"sweep: {key} cannot vary in a sweep: {OWN_KEYS[first]}")
    variants = combinations(section.variants, axes, plain=recipe_name)
    recipe = _one_of(name, fixed, variants, wrong)
    folder = Path(recipe.run_folder if "run" in set_aside else f"{recipe.run_folder}-sweep")
    plan = SweepPlan(
        recipe.name, folder, variants, list(range(recipe.rng_seed, recipe.rng_seed + count)),
        list(models) if models else section.models,
    )  # fmt: skip
    always = ["sweep=null"]
    if jobs > 1 and recipe.launch.threads is None:
        always.append(f"launch.threads={max(1, processors() // (jobs * jobs_at_once(build_graph(recipe))))}")
    problems: list[tuple[str, str]] = []
    for rng_seed in plan.rng_seeds:
        for variant in variants:
            of_run = [f"run={inline_yaml(str(folder / variant.label / f'rng-{rng_seed}'))}", f"rng_seed={rng_seed}",
                      *always]  # fmt: skip
            try:
                run = SweepRun(variant, rng_seed, load_recipe(name, [*fixed, *of_run], variant=variant.overrides))
                check(run.recipe)
                plan.runs.append(run)
            except UserError as error:
                if variant.label not in [label for label, _ in problems]:  # once, not for every rng seed
                    problems.append((variant.label, str(error)))
    if problems:
        raise _wrong_variants(problems)
    plan.runs.sort(key=lambda run: (run.rng_seed, _steps_that_are_shared(run.recipe)))
    return plan


def without_trunk(plan: SweepPlan) -> str:
    """Settings that follow from the tokens of trainings of several lengths, which therefore have no trunk in common;
    empty if there are none."""
    named = []
    for name in SECTIONS:
        lengths, followed = set[int](), set[str]()
        for recipe in (run.recipe for run in plan.runs):
            training: Training | None = attrgetter(name)(recipe)
            if training is not None and training.schedule != "cosine":
                lengths.add(training.tokens)
                derived = (recipe.derived or {}).get(name)
                followed |= set(derived.values) & OF_A_TRUNK if derived is not None else set()
        if len(lengths) > 1 and followed:
            named.append(f"{name}.{{{','.join(sorted(followed))}}}")
    return ", ".join(named)


def _section(name: str, fixed: Sequence[str]) -> tuple[str, Sweep, RecipeError | None]:
    """The recipe's name, its `sweep` section, and what is wrong with it without a variant: a setting that all have may
    go with one that varies.

    Raises:
        RecipeError: the section itself is wrong, or there is no such recipe.
    """
    try:
        recipe = load_recipe(name, fixed)
    except RecipeError as error:
        if (read := read_sweep(name, fixed)) is None:
            raise
        return *read, error
    return recipe.name, recipe.sweep or Sweep(), None


def _one_of(name: str, fixed: Sequence[str], variants: Sequence[Variant], wrong: RecipeError | None) -> Recipe:
    """A recipe that has what all variants have: name, run folder, rng seed. The one without a variant, if nothing is
    `wrong` with it, else the first that can be read.

    Raises:
        RecipeError: none can; told once where it is the same with all variants.
    """
    if wrong is None:
        return load_recipe(name, fixed)
    problems = []
    for variant in variants:
        try:
            return load_recipe(name, fixed, variant=variant.overrides)
        except RecipeError as error:
            problems.append((variant.label, str(error)))
    if all(line in text for line in str(wrong).splitlines() for _, text in problems):
        raise wrong
    texts = {text for _, text in problems}
    raise RecipeError(texts.pop()) if len(texts) == 1 else _wrong_variants(problems)


def _wrong_variants(problems: Sequence[tuple[str, str]]) -> RecipeError:
    return RecipeError("\n".join(f"variant {label}: {text}" for label, text in problems))


def _steps_that_are_shared(recipe: Recipe) -> list[int]:
    """Steps before any decay, training by training: of two runs the one with fewer goes first, as the other one goes on
    from there, and nothing is cut off."""
    branches = [recipe.branch_training(domain) for domain in recipe.train.domains]
    trainings = [recipe.seed_model.train, *branches, recipe.finetune]
    length = recipe.data.sequence_length
    return [steps_before_decay(training.steps(length), training) for training in trainings if training is not None]


def combinations(
    variants: Mapping[str, Mapping[str, Any]], axes: Mapping[str, Sequence[Any]], *, plain: str
) -> list[Variant]:
    """Named variants times every combination of the varied values, the last key varying fastest.

    The label is made of the varied settings alone, so that a value added later leaves the others' folders as they are;
    `plain` is the label where nothing varies.

    Raises:
        UserError: two combinations are the same, too many, or called like a file of the sweep.
    """
    number = max(1, len(variants)) * math.prod(map(len, axes.values()))
    if number > MOST_VARIANTS:
        raise UserError(
            f"sweep: {number:,} combinations, at most {MOST_VARIANTS:,} are made; vary fewer settings at a time"
        )
    combined = []
    single = {key: values[0] for key, values in axes.items() if len(values) == 1}
    many = {key: values for key, values in axes.items() if len(values) > 1}
    for variant, settings in (variants or {"": {}}).items():
        for values in itertools.product(*many.values()):
            chosen = dict(zip(many, values, strict=True))
            parts = [variant] if variant else []
            parts += [f"{key}={value_label(value)}" for key, value in chosen.items()]
            combined.append(Variant(",".join(parts) or plain, single | dict(settings) | chosen))
    labels = [variant.label for variant in combined]
    for label in labels:
        if label in OWN_FILES:
            raise UserError(
                f"sweep: a variant cannot be called {label!r}: the sweep's own file has this name; rename it"
            )
    if twice := sorted(label for label, count in Counter(labels).items() if count > 1):
        raise UserError(f"the sweep has the same variant twice: {', '.join(twice)}")
    return combined


def value_label(value: Any) -> str:
    """A value as part of a folder's name: equal values have equal names, other values other ones."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)  # 1e6 and 1000000 are one setting
    text = inline_yaml(value)
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.")
    if plain == text and len(text) <= LONGEST_VALUE:
        return text
    return f"{plain[:LONGEST_VALUE]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".lstrip("-")


def split_values(text: str) -> list[str]:
    """Split at the commas that stand in no bracket, brace or quotes: `[a,b],{c: 1, d: 2},e` → three values.

    Raises:
        UserError: an empty value, or a bracket or quote that is not closed.
    """
    values, depth, quote, start = [], 0, "", 0
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and text[:position].rstrip(" ")[-1:] in ("", *"[{,:"):  # where a YAML value begins
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            values.append(text[start:position].strip())
            start = position + 1
    values.append(text[start:].strip())
    if depth or quote:
        raise UserError(f"{text!r}: a bracket or quote is not closed")
    if len(values) > 1 and not all(values):
        raise UserError(f"{text!r}: an empty value between commas; a text that holds commas goes in quotes")
    return values


def _arguments(arguments: Iterable[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """Overrides for all variants, and the keys that vary with their values."""
    fixed: list[str] = []
    varied: dict[str, list[Any]] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"{argument!r}: expected key=value, or key=a,b,c to vary it")
        values = split_values(text)
        if key in varied or (len(values) > 1 and key in [override.partition("=")[0].strip() for override in fixed]):
            raise UserError(f"{key} is given twice: write all its values in one argument")
        if len(values) == 1:
            fixed.append(argument)
        elif (first := key.split(".")[0]) in OWN_KEYS:
            raise UserError(f"{key} cannot vary in a sweep: {OWN_KEYS[first]}")
        else:
            varied[key] = [_value(text, argument) for text in values]
    return fixed, varied


def _value(text: str, argument: str) -> Any:
    try:
        document = read_yaml(text, repr(argument))
    except YamlSyntaxError as error:
        raise UserError(str(error.problem)) from None
    if document.problems:
        raise UserError(str(document.problems[0]))
    return document.value
