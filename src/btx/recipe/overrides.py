"""The command line's dotted overrides: `train.learning_rate=1e-3`, `train.domains=[math,code]`, `data.root=../x`."""

from __future__ import annotations

from typing import Any

from btx.recipe.yaml_positions import MAX_DEPTH, Document, KeyPath, Place, Problem, YamlSyntaxError, dotted, read_yaml


def apply_override(document: Document, override: str) -> None:
    """Apply `dotted.key=value` to the document; what it sets is placed at the override itself.

    Parts of the key are mapping keys, or indices where the document has a list; sections not written are made. Nothing
    is raised: what is wrong with the override joins `document.problems`.
    """
    place = Place(f"override {override!r}")
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


def _entry(inner: Any, part: str) -> str | int | None:
    """`part` as a key of a mapping or an index of a list; None if it cannot be one."""
    if isinstance(inner, dict):
        return part
    if isinstance(inner, list) and part.isdecimal() and int(part) < len(inner):
        return int(part)
    return None


def _replace_places(document: Document, path: KeyPath, value: Document, place: Place) -> None:
    """Everything at and below `path` was written at `place` from now on."""
    for places in (document.keys, document.values):
        for written in [written for written in places if written[: len(path)] == path]:
            del places[written]
    document.keys[path] = place
    document.keys.update({(*path, *below): place for below in value.keys})
    document.values.update({(*path, *below): place for below in value.values})
