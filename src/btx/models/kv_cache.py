"""The key-value cache of a generating model, whatever the installed transformers calls it.

transformers renamed the forward argument and the output's field from `past_key_values` to `cache` in 5.24. The cache
object is made here and filled in place, so only the argument's name matters.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for `model`."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def cache_arguments(model: PreTrainedModel, cache: DynamicCache) -> dict[str, Any]:
    """Keyword arguments with which a forward pass reads and extends `cache`."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}
