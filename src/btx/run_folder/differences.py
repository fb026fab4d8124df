"""What changed between a stage as it was begun and as the recipe and its files have it now. Plain Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

HASHES = {"files", "owns_held_out"}
"""Keys of settings that hold hashes, or follow from them: files are named instead."""
FOLLOWS = {
    "mixture": "the text it reads", "mixtures": "the text it reads", "texts": "the text it reads",
    "domains": "the domains it is measured on", "experts": "the experts", "members": "the experts",
    "matched": "the training it is matched to",
    "apart_from": "what other domains hold out", "trained_on_before": "what other domains hold out",
}  # fmt: skip
"""Key of a stage's settings that are made from other settings → what they say."""
ELSEWHERE = {
    "sequence_length": "data.sequence_length", "held_out": "data.held_out", "tokenizer": "seed_model.tokenizer",
    "pretrained_tokens": "seed_model.pretrained_tokens",
    "model_type": "seed_model.config.model_type", "path": "seed_model.path", "revision": "seed_model.revision",
    "generalist": "mix.generalist", "split": "mix.split", "router_std": "mix.router_std", "router": "mix.router",
    "router.kind": "mix.router", "dtype": "mix.dtype", "max_shard_size": "mix.max_shard_size", "tokens": "train.tokens",
}  # fmt: skip
"""Key of a stage's settings → where the recipe has it, unless they are the same."""
LONGEST = 120


def changed_settings(stage: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two settings of a stage, as `train.learning_rate: 0.001 → 0.002` lines, keys as a recipe has
    them.

    What only follows from other settings is told only if none of those differ.
    """
    lines = [f"{_recipe_key(stage, path)}: {change}" for path, change in _changed(old, new)]
    lengths = [_length(settings) for settings in (old, new)]
    if None not in lengths and lengths[0] != lengths[1]:
        lines.append(f"data.sequence_length: {lengths[0]} → {lengths[1]}")
    following = [key for key in FOLLOWS if old.get(key) != new.get(key)] if not lines else []
    for key in following:
        before, after = (_shares(settings.get(key)) for settings in (old, new))
        shows_shares = before and after and FOLLOWS[key] != FOLLOWS["apart_from"]  # hashes
        lines.append(f"{FOLLOWS[key]}: {before} → {after}" if shows_shares else f"{FOLLOWS[key]} changed")
    return list(dict.fromkeys(lines))


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, what became of what) of every setting that differs and follows from nothing."""
    for key in sorted(old.keys() | new.keys()):
        before, after, path = old.get(key), new.get(key), f"{prefix}{key}"
        if before == after or key in HASHES or path in FOLLOWS:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changed(before, after, f"{path}.")
        elif isinstance(before, Mapping) or isinstance(after, Mapping):
            yield path, "added" if before is None else "left out" if after is None else "changed"
        else:
            yield path, f"{_short(before)} → {_short(after)}"


def _read(value: Any) -> list[Mapping[str, Any]]:
    """The mixtures among a stage's settings, {"mixture": [[component, weight]...], "sequence_length"} each."""
    mixtures = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else []
    return [mixture for mixture in mixtures if isinstance(mixture, Mapping) and "mixture" in mixture]


def _length(settings: Mapping[str, Any]) -> int | None:
    """Tokens of a sequence, where they stand inside the mixtures."""
    lengths = [mixture["sequence_length"] for key in FOLLOWS for mixture in _read(settings.get(key))]
    return lengths[0] if lengths else None


def _shares(value: Any) -> str:
    """What share of which domain is read, of one or several mixtures; names in a row; empty for anything else."""
    if mixtures := _read(value):
        return _short("; ".join(_shares(mixture["mixture"]) for mixture in mixtures))
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        pairs = value if isinstance(value, list) else []
        if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            return ""
        named = [(component.removesuffix("/0"), weight) for component, weight in pairs]
        return ", ".join(f"{100 * weight:.3g} % {name}" if weight < 1 else name for name, weight in named)
    return ", ".join(value)


def _words(value: Any) -> str:
    """A value as a recipe would write it."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    words = _words(value)
    return f"{words[:LONGEST]} ..." if len(words) > LONGEST else words


def _recipe_key(stage: str, path: str) -> str:
    """Where a recipe has what stands at `path` of a stage's settings."""
    kind, _, name = stage.partition("/")
    key, _, rest = path.partition(".")
    if key == "sources":
        return "data.held_out" if rest.endswith("held_out_share") else f"data.domains.{name}.{path}"
    if key == "training":  # of a baseline: the first of two phases has the settings of `train`
        return f"{'train' if stage.endswith('_domains') else 'finetune'}.{rest}"
    if kind == "train" and rest == "tokens":
        return f"train.tokens of {name}"
    if path in ELSEWHERE or key in ELSEWHERE:
        return ELSEWHERE.get(path) or f"{ELSEWHERE[key]}.{rest}"
    return path


def changed_files(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The files that differ, by what they hold (path → SHA-256): a file that only moved is the same."""
    here, before = set(new.values()), set(old.values())
    gone = {PurePath(path).name for path, sha256 in old.items() if sha256 not in here}
    added = {path: PurePath(path).name for path, sha256 in new.items() if sha256 not in before}
    lines = [f"{path} changed" if name in gone else f"{path} is new" for path, name in added.items()]
    return lines + [f"{name} is gone" for name in sorted(gone - set(added.values()))]
