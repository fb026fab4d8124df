"""What `btx ls` lists. Plain Python."""

from __future__ import annotations

from collections.abc import Callable

from btx.choices.baselines import BASELINES
from btx.choices.families import family_table
from btx.choices.generators import GENERATORS
from btx.choices.launchers import LAUNCHERS
from btx.choices.merges import MERGE_METHODS
from btx.choices.routers import ROUTERS
from btx.choices.trackers import TRACKERS
from btx.recipe.loading import packaged_recipes

CATALOGUE: dict[str, Callable[[], dict[str, str]]] = {
    "recipes": packaged_recipes,
    "domains": lambda: {name: generator.summary for name, generator in GENERATORS.items()},
    "routers": lambda: {name: kind.summary for name, kind in ROUTERS.items()},
    "merges": lambda: {name: method.described for name, method in MERGE_METHODS.items()},
    "baselines": lambda: {name: kind.summary for name, kind in BASELINES.items()},
    "families": family_table,
    "launchers": lambda: dict(LAUNCHERS),
    "trackers": lambda: dict(TRACKERS),
}
"""Kind of thing → names, each with a line."""
