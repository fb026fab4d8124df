"""`extends`: a recipe that says only what is different from another one. Plain Python.

Sections of the schema are merged key by key. Everything else, mappings with names of the user's choice included (the
domains, the tasks, a mixture, a model's config), is taken as a whole from the recipe that says it: a table of domains
of which half came from elsewhere would be nobody's recipe. So is `sweep`: another recipe's variants are not this one's.
And how the rate decays goes with the schedule: who names one that has no decay takes none from another recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from btx.recipe.problems import section_at
from btx.recipe.schema import Sweep
from btx.recipe.training import OF_THE_DECAY
from btx.recipe.yaml_positions import Document, KeyPath

OWN = ("name", "description", "run")
"""Keys a recipe never takes from another one."""


def fill_in(document: Document, extended: Document) -> None:
    """Put what `document` leaves out into it from `extended`, with the places where it was written."""
    values = {key: value for key, value in extended.value.items() if key not in OWN}
    known = set(document.problems)
    document.problems += [problem for problem in extended.problems if problem not in known]
    taken = set(_fill(document.value, values, ()))
    for places, theirs in ((document.keys, extended.keys), (document.values, extended.values)):
        for path in [path for path in places if _is_below(path, taken)]:
            del places[path]
        places.update({path: place for path, place in theirs.items() if _is_below(path, taken)})


def _fill(mine: dict[str, Any], theirs: dict[str, Any], path: KeyPath) -> Iterator[KeyPath]:
    """Put what `mine` leaves out into it; yields the path of everything that is taken as a whole."""
    not_taken = OF_THE_DECAY if mine.get("schedule", "wsd") != "wsd" else ()
    for key, value in theirs.items():
        here = (*path, key)
        if key in not_taken:
            continue
        if key not in mine:
            mine[key] = value
            yield here
        elif isinstance(mine[key], dict) and isinstance(value, dict) and section_at(here) not in (None, Sweep):
            yield from _fill(mine[key], value, here)


def _is_below(path: KeyPath, tops: set[KeyPath]) -> bool:
    return any(path[:length] in tops for length in range(1, len(path) + 1))
