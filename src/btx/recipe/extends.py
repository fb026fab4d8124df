"""`extends`: a recipe that says only what is different from another one. Plain Python.

Sections of the schema are merged key by key. Everything else, mappings with names of the user's choice included (the
domains, the tasks, a mixture, a model's config), is taken as a whole from the recipe that says it: a table of domains
of which half came from elsewhere would be nobody's recipe. So is `sweep`: another recipe's variants are not this one's.
"""

from __future__ import annotations

from typing import Any

from btx.recipe.problems import section_at
from btx.recipe.yaml_positions import Document, KeyPath

OWN = ("name", "description", "run")
"""Keys a recipe never takes from another one."""


WHOLE = (("sweep",),)
"""Sections that are not merged key by key."""


def fill_in(document: Document, extended: Document) -> None:
    """Put what `document` leaves out into it from `extended`, with the places where it was written."""
    given = {key: value for key, value in extended.value.items() if key not in OWN}
    document.problems += [problem for problem in extended.problems if problem not in document.problems]
    _fill(document, extended, document.value, given, ())


def _fill(document: Document, extended: Document, mine: dict[str, Any], given: dict[str, Any], path: KeyPath) -> None:
    for key, value in given.items():
        here = (*path, key)
        if key not in mine:
            mine[key] = value
            _take_places(document, extended, here)
        elif here in WHOLE:
            continue
        elif isinstance(mine[key], dict) and isinstance(value, dict) and section_at(here) is not None:
            _fill(document, extended, mine[key], value, here)


def _take_places(document: Document, extended: Document, path: KeyPath) -> None:
    """Everything at and below `path` was written in the extended recipe."""
    for places, theirs in ((document.keys, extended.keys), (document.values, extended.values)):
        for below in [below for below in places if below[: len(path)] == path]:
            del places[below]
        places.update({below: place for below, place in theirs.items() if below[: len(path)] == path})
