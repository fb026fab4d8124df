"""Batch, learning rate, warm-up and checkpoint interval of a training section that names none. Plain Python.

Where a recipe leaves them out they follow from the seed model's size and the section's tokens; with `paper: true` they
are the paper's, for a 7B model and 4M tokens a step. Sources:

    batch_tokens      0.58 D^0.571 tokens for D training tokens, at most the paper's 4M, in whole sequences
                      (Li et al., arXiv 2503.04715, "step law")
    learning_rate     1.79 N^-0.713 D^0.307 for N parameters outside the embeddings (the same), at most 6e-3, as the law
                      was fitted on models from 60M up; a third of that where a trained model is trained on, as the
                      paper took 1e-4 where Llama 2 had been trained at 3e-4; twice that third for branches that train
                      their feed-forward sublayers alone, or adapters on them (docs/footguns.md)
    warmup_steps      a twentieth of the steps, at most the paper's 100
    checkpoint_every  a tenth of the steps, from 10 to 1000: no more than that is lost

docs/decisions.md compares the rules with recipes that were tuned by hand.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from btx.files import home_filled
from btx.recipe.schema import Recipe, is_basis
from btx.recipe.training import Training

SETTINGS = ("batch_tokens", "learning_rate", "warmup_steps", "checkpoint_every")
SECTIONS = ("seed_model.train", "train", "finetune")
PAPER_SIZE = 6_500_000_000
"""Parameters of a model whose size nothing says: its learning rate is then a careful one."""
MOST_BATCH, MOST_RATE, MOST_WARMUP = 4_000_000, 6e-3, 100

Values = dict[str, Any]


def fill_in_training(recipe: Values, before: Mapping[str, Any] | None) -> None:
    """Fill in what the training sections of a recipe leave out, and note it under `derived`.

    What the run folder has noted stays as long as the same follows from the same, so that another version's rules
    change no finished run. A run that was begun before there were such rules keeps the paper's values.

    Args:
        recipe: as it was read, not checked yet: sections that are broken are left alone.
        before: the recipe in its run folder, if there is one.
    """
    if before is not None and not isinstance(before.get("derived"), dict):
        return
    parameters = model_parameters(recipe.get("seed_model"))
    derived = {}
    for name in SECTIONS if recipe.get("paper") is not True else ():
        section, noted = _section(recipe, name), _noted(before or {}, name)
        if section is None:
            continue
        basis = _basis(recipe, name, section, parameters or noted.get("basis", {}).get("parameters"))
        if basis is None:
            continue
        values = _values(basis, fresh=name == "seed_model.train")
        if noted.get("basis") == basis:
            values |= noted["values"]
        missing = {key: value for key, value in values.items() if key not in section}
        if missing:
            section |= missing
            derived[name] = {"basis": basis, "values": missing}
    if derived or "derived" not in recipe:  # else a recipe out of a run folder, which says everything
        recipe["derived"] = derived


def model_parameters(seed: Any) -> int | None:
    """Parameters of the seed model outside its embeddings, from the config that the recipe or the folder has, or about
    what a hub name says ("Llama-3.2-1B"); None if nothing tells."""
    seed = seed if isinstance(seed, dict) else {}
    path = seed.get("path")
    config = seed.get("config") or seed.get("plan_config")
    if config is None and isinstance(path, str):
        try:
            config = json.loads((home_filled(path) / "config.json").read_text("utf-8"))
        except (OSError, ValueError):
            said = re.search(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BM])(?![A-Za-z0-9])", Path(path).name, re.IGNORECASE)
            return round(float(said[1]) * (1e9 if said[2] in "Bb" else 1e6)) or None if said else None
    return _count(config) if isinstance(config, dict) else None


def training_notes(recipe: Recipe) -> list[str]:
    """What to know of the training sections before anything runs: what was filled in, and budgets that are smaller
    than a step or its warm-up."""
    notes = []
    for name, derived in (recipe.derived or {}).items():
        said = ", ".join(
            f"{key} {value:,}" if value >= 1 else f"{key} {value:g}" for key, value in derived.values.items()
        )
        size, tokens = derived.basis.get("parameters"), derived.basis.get("tokens")
        of = f"{size:,} parameters" if size else "a model of unknown size, so a learning rate as for 7B"
        notes.append(f"{name}: {said}: not in the recipe, so from {tokens:,} tokens and {of}")
    for name, training in _trainings(recipe).items():
        notes += [f"{name}: {problem}" for problem in _too_short(training, recipe.data.sequence_length)]
    return notes


def _trainings(recipe: Recipe) -> dict[str, Training]:
    """Where the recipe says it → the settings of a training."""
    seed = recipe.seed_model.train
    trainings: dict[str, Training] = {"seed_model.train": seed} if seed is not None else {}
    for domain in recipe.train.domains:
        has_tokens = domain in recipe.train.domain_tokens
        trainings[f"train.domain_tokens.{domain}" if has_tokens else "train"] = recipe.branch_training(domain)
    trainings["finetune"] = recipe.finetune
    for name, baseline in recipe.baseline_training.items():
        own_tokens = {} if baseline.tokens is None else {"tokens": baseline.tokens}
        trainings[f"baseline_training.{name}"] = recipe.finetune.model_copy(update=baseline.settings | own_tokens)
    return trainings


def _too_short(training: Training, length: int) -> Iterator[str]:
    step, steps = training.step_tokens(length), training.steps(length)
    if training.batch_tokens < length:
        yield f"batch_tokens {training.batch_tokens:,} are less than one sequence; a step has one, {length:,} tokens"
    if step > training.tokens:
        yield (
            f"{training.tokens:,} tokens are less than one optimiser step (batch_tokens {training.batch_tokens:,}, "
            f"data.sequence_length {length:,}): one step of {step:,} is trained; lower batch_tokens or raise tokens"
        )
    if training.warmup_steps >= steps:
        yield (
            f"warmup_steps {training.warmup_steps:,} of {steps:,} optimiser step{'s' * (steps > 1)}: the learning rate "
            f"rises to the last one, where it is at its peak; lower warmup_steps or batch_tokens, or raise tokens"
        )


def _section(recipe: Mapping[str, Any], name: str) -> Values | None:
    section: Any = recipe
    for key in name.split("."):
        section = section.get(key) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else None


def _noted(before: Mapping[str, Any], name: str) -> Values:
    """What a run folder's recipe has noted of a section."""
    noted = before.get("derived", {}).get(name)
    whole = isinstance(noted, dict) and is_basis(noted.get("basis")) and isinstance(noted.get("values"), dict)
    return noted if whole else {}


def _basis(recipe: Mapping[str, Any], name: str, section: Mapping[str, Any], parameters: int | None) -> Values | None:
    """All that the values follow from; None where it is missing or broken, which is told elsewhere."""
    data = recipe.get("data")
    length = data.get("sequence_length", 4096) if isinstance(data, dict) else None
    counts = {"tokens": section.get("tokens"), "sequence_length": length}
    if "batch_tokens" in section:
        counts["batch_tokens"] = section["batch_tokens"]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and 1 <= n < 1e18 for n in counts.values()):
        return None
    trainable = section.get("trainable", "feed_forward") if name == "train" else "all"
    return {key: int(n) for key, n in counts.items() if n} | {"parameters": parameters, "trainable": str(trainable)}


def _values(basis: Mapping[str, Any], *, fresh: bool) -> Values:
    """The rules at the top; `fresh`: training starts from random weights."""
    tokens, length = basis["tokens"], basis["sequence_length"]
    batch = basis.get("batch_tokens") or min(MOST_BATCH, 0.58 * tokens**0.571)
    step = max(1, round(batch / length)) * length
    steps = math.ceil(tokens / step)
    size = basis["parameters"] or PAPER_SIZE
    rate = min(MOST_RATE, 1.79 * size**-0.713 * tokens**0.307)
    share = 1.0 if fresh else 2 / 3 if basis.get("trainable") in ("feed_forward", "lora") else 1 / 3
    return {
        "batch_tokens": step,
        "learning_rate": float(f"{rate * share:.1e}"),
        "warmup_steps": min(MOST_WARMUP, math.ceil(steps / 20), steps - 1),
        "checkpoint_every": min(1000, max(10, steps // 10)),
    }


def _count(config: Mapping[str, Any]) -> int | None:
    """Parameters of the layers' matrices, for classes with a gated feed-forward sublayer."""
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    sizes = [size for key in keys if _is_size(size := config.get(key))]
    if len(sizes) < len(keys):
        return None
    width, layers, feed_forward, heads = sizes
    key_values, head = config.get("num_key_value_heads") or heads, config.get("head_dim") or width // heads
    if not _is_size(key_values) or not _is_size(head):
        return None
    return layers * (2 * width * head * (heads + key_values) + 3 * width * feed_forward)


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and 0 < value < 1e12
