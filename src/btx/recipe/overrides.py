"""The command line's dotted overrides: `train.learning_rate=1e-3`, `train.domains=[math,code]`, `data.root=../x`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from btx.recipe.training import OF_THE_DECAY
from btx.recipe.yaml_positions import MAX_DEPTH, Document, KeyPath, Place, Problem, YamlSyntaxError, dotted, read_yaml


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Apply overrides that are written together, as `apply_override` does each.

    One that names a `schedule` without a decay takes back what the document says of wsd's. What is said of it beside
    that override stays, for the schema to refuse.
    """
    for override in overrides:
        apply_override(document, override)
    here = {_place(override) for override in overrides}
    for path in [path for path, place in document.values.items() if path[-1:] == ("schedule",) and place in here]:
        section = document.value
        for part in path[:-1]:
            section = section[part]
        before = [
            name for name in OF_THE_DECAY if name in section and document.values.get((*path[:-1], name)) not in here
        ]
        for name in before if section["schedule"] != "wsd" else ():
            del section[name]
            _forget_places(document, (*path[:-1], name))


def apply_override(document: Document, override: str) -> None:
    """Apply `dotted.key=value` to the document; what it sets is placed at the override itself.

    Parts of the key are mapping keys, or indices where the document has a list; sections not written are made. Nothing
    is raised: what is wrong with the override joins `document.problems`.
    """
    place = _place(override)
    dotted_key, equals, text = override.partition("=")
    parts = dotted_key.strip().split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        document.problems.append(Problem(place, "", "an override is dotted.key=value, such as mix.top_k=1"))
        return
    try:
        value = read_yaml(text, place.source)
    except YamlSyntaxError as error:
        document.problems.append(Problem(place, dotted_key, error.problem.text))
        return
    document.problems += [Problem(place, dotted_key, problem.text) for problem in value.problems]
    path: KeyPath = ()
    inner = document.value
    for part in parts[:-1]:
        key = _entry(inner, part)
        if key is None:
            break
        if isinstance(inner, dict) and inner.get(part) is None:  # a section that was not written
            inner[part] = {}
            document.keys[(*path, part)] = document.values[(*path, part)] = place
        inner, path = inner[key], (*path, key)
    last = _entry(inner, parts[-1])
    if last is None or len(path) + 1 < len(parts):
        within = f"{dotted(path)} is {'a list of ' + str(len(inner)) if isinstance(inner, list) else 'one value'}"
        document.problems.append(Problem(place, dotted_key, f"{within}: there is no {parts[len(path)]!r} in it"))
        return
    inner[last] = value.value
    _replace_places(document, (*path, last), value, place)


def _place(override: str) -> Place:
    return Place(f"override {override!r}")


def _entry(inner: Any, part: str) -> str | int | None:
    """`part` as a key of a mapping or an index of a list; None if it cannot be one."""
    if isinstance(inner, dict):
        return part
    if isinstance(inner, list) and part.isdecimal() and int(part) < len(inner):
        return int(part)
    return None


def _replace_places(document: Document, path: KeyPath, value: Document, place: Place) -> None:
    """Everything at and below `path` was written at `place` from now on."""
    _forget_places(document, path)
    document.keys[path] = place
    document.keys.update({(*path, *below): place for below in value.keys})
    document.values.update({(*path, *below): place for below in value.values})


def _forget_places(document: Document, path: KeyPath) -> None:
    for places in (document.keys, document.values):
        for written in [written for written in places if written[: len(path)] == path]:
            del places[written]
