"""What changed between a stage as it was begun and as the recipe and its files have it now. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

HASHES = {"files", "apart_from", "trained_on_before", "texts"}
"""Keys of settings that hold hashes: files are named instead."""
DERIVED = {"mixture", "mixtures", "domains"}
"""Keys of settings that are made from other settings."""


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two settings, as `train.learning_rate: 0.001 → 0.002` lines.

    What only follows from other settings is told only if none of those differ.
    """
    lines = _changed(old, new, prefix, HASHES | DERIVED)
    return lines or _changed(old, new, prefix, HASHES)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str, left_out: set[str]) -> list[str]:
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if key in left_out or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _changed(before, after, f"{prefix}{key}.", left_out)
        else:
            lines.append(f"{prefix}{key}: {_shown(before, after)}")
    return lines


def changed_files(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The files that differ, by what they hold: a file that only moved is the same.

    Args:
        old: path → SHA-256, as recorded.
        new: the same now.
    """
    here, before = set(new.values()), set(old.values())
    gone = {PurePath(path).name for path, sha256 in old.items() if sha256 not in here}
    added = {path: PurePath(path).name for path, sha256 in new.items() if sha256 not in before}
    lines = [f"{path} changed" if name in gone else f"{path} is new" for path, name in added.items()]
    return lines + [f"{name} is gone" for name in sorted(gone - set(added.values()))]


def _shown(before: Any, after: Any) -> str:
    if isinstance(before, dict) or isinstance(after, dict):
        return "added" if before is None else "left out" if after is None else "changed"
    return f"{before} → {after}"
