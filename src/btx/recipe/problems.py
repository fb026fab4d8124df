"""pydantic's findings about a recipe → problems in a user's words, at the places of the user's file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from btx.recipe.data import Domain
from btx.recipe.schema import Recipe
from btx.recipe.yaml_positions import Document, KeyPath, Problem, dotted

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping (name: value)",
    "model_type": "a mapping (name: value)",
}

ELSEWHERE = {
    "branch_at": "points at which models branch from one training are a sweep: seed_model.train.schedule is constant, "
    "seed_model.train.tokens varies (docs/sweeps.md)",
}
"""A key that no section has → how its wish is written."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` if one of `allowed` is close to `word`, else nothing."""
    close = get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def schema_problems(errors: Iterable[ErrorDetails], document: Document) -> Iterator[Problem]:
    """One problem per pydantic error, placed at the nearest key or value the user wrote."""
    errors = _without_options(errors)
    words = {error["loc"][:-1]: error["ctx"]["expected"].strip("'") for error in errors if _is_word(error)}
    for error in errors:
        kind, path = error["type"], error["loc"]
        if _is_word(error):  # a number or a word, true, false or a word: once, as the other
            continue
        if path[:-1] in words:
            path = path[:-1]
        if path and path[-1] == "[key]":  # a mapping's key that is no valid name
            here = document.locate(path[:-1])
            yield Problem(document.keys.get(here, document.values[here]), dotted(here), _words(error, path[:-1]))
            continue
        here = document.locate(path)
        place = document.values[here]
        if kind == "extra_forbidden":
            yield Problem(document.keys.get(here, place), dotted(here), _unknown_key(path, here))
        elif kind == "missing":
            yield Problem(
                document.keys.get(here, place), dotted(here), f"missing key {str(path[-1])!r}{_meaning(path)}"
            )
        elif kind == "value_error":
            text = str(error["ctx"]["error"])
            named = _named_in(text, document)
            setting = (*here, text.split(" ")[0])  # `decay_share goes with ...` is placed where that stands
            section = Problem(document.keys.get(setting, document.keys.get(here, place)), dotted(here), text)
            yield Problem(document.values[named], "", text) if named else section
        else:
            shown = path if here == path[:-1] else here  # a default that does not fit: `name` from the file's name
            yield Problem(place, dotted(shown), _words(error, path, words.get(path)))


def _without_options(errors: Iterable[ErrorDetails]) -> list[ErrorDetails]:
    """What pydantic says of a field that takes a number or a mapping: only of the one that was written, and without
    its name for the two."""
    errors = list(errors)
    paths = [error["loc"] for error in errors]
    places = {path[:depth] for path in paths for depth, part in enumerate(path) if str(part).startswith("dict[")}
    plain = []
    for error in errors:
        depth = next((len(place) for place in places if error["loc"][: len(place)] == place), None)
        if depth is not None:
            option, *behind = error["loc"][depth:]
            if not behind and isinstance(error["input"], dict) is str(option).startswith("constrained-"):
                continue
            error = {**error, "loc": (*error["loc"][:depth], *behind)}
        plain.append(error)
    return plain


def _is_word(error: ErrorDetails) -> bool:
    """Whether this is about the word that a field takes beside numbers or true and false."""
    return bool(error["loc"]) and str(error["loc"][-1]).startswith("literal[")


def _named_in(text: str, document: Document) -> KeyPath | None:
    """The written path that a cross-field message names first, such as `mix.top_k is 3, but ...`."""
    for word in re.findall(r"[a-z_0-9.]+", text):
        path = tuple(word.strip(".").split("."))
        if len(path) > 1 and path in document.values:
            return path
    return None


def _unknown_key(path: KeyPath, here: KeyPath) -> str:
    key = str(path[-1])
    section = section_at(path[:-1])
    allowed = list(section.model_fields) if section else []
    if len(path) - len(here) == 2:  # `sources` and 0 were not written: one source's keys stand in the domain itself
        allowed += Domain.model_fields
    told = f"; {ELSEWHERE[key]};" if key in ELSEWHERE else did_you_mean(key, allowed) or ";"
    return f"unknown key {key!r}{told} allowed: {', '.join(allowed)}"


def _words(error: ErrorDetails, path: KeyPath, word: str | None = None) -> str:
    """What was expected and what was given, for errors about one value; instead it might have been `word`."""
    kind, value = error["type"], error["input"]
    if kind == "literal_error":
        allowed = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        return f"expected one of {', '.join(allowed)}, got {_shown(value)}{did_you_mean(str(value), allowed)}"
    if kind == "string_pattern_mismatch":
        return f"expected a name (letters, digits, '_', '-', '.'; at most 64 characters), got {_shown(value)}"
    if kind == "too_short":
        return f"expected at least {error['ctx']['min_length']} entry, got an empty list"
    if expected := _EXPECTED.get(kind):
        hint = ": put it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
        either = f" or {word}" if word else ""
        return f"expected {expected}{either}, got {_shown(value)}{hint}{_meaning(path)}"
    requirement = error["msg"].replace("Input should be", "must be")
    return f"{requirement}, got {_shown(value)}{_meaning(path)}"


def _shown(value: Any) -> str:
    """A value as the user wrote it, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _meaning(path: KeyPath) -> str:
    """The first sentence of the field's description, in parentheses."""
    section = section_at(path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    if field is None or not field.description:
        return ""
    sentence = " ".join(field.description.split()).split(". ")[0].rstrip(".")
    return f" ({sentence})"


def section_at(path: KeyPath) -> type[BaseModel] | None:
    """The schema's section at a path of pydantic's, None where there is no such section."""
    kind: Any = Recipe
    for part in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            kind = _bare(field.annotation) if field else None
        else:
            kind = _bare(get_args(kind)[-1]) if get_origin(kind) in (list, dict) else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _bare(kind: Any) -> Any:
    """An annotation without `Annotated` and without `| None`."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return _bare(next(inner for inner in get_args(kind) if inner is not type(None)))
    return kind
