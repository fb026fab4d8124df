"""btx: Branch-Train-MiX (arXiv 2403.07816) for Hugging Face models.

    import btx

    recipe = btx.load_recipe("demo")
    run = btx.run(recipe)                              # everything, from nothing to a report
    btx.mix(seed, {"math": math, "code": code}, out)   # or one step, on anybody's checkpoints
    model = btx.load_model(out)

Names are imported when they are used, so that `import btx` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from btx.balancing import load_balancing_loss
    from btx.drop import drop
    from btx.errors import BtxError, UserError
    from btx.extend import extend
    from btx.mix import mix, soup
    from btx.models import load_model, load_tokenizer
    from btx.moe import MoE
    from btx.pipeline import run
    from btx.plan import plan
    from btx.recipe import Recipe
    from btx.recipe_loading import load_recipe
    from btx.report import write_report
    from btx.routers import top_k_gates
    from btx.rundir import RunFolder

__version__ = "0.1.0"

_HOME = {
    "BtxError": "btx.errors",
    "MoE": "btx.moe",
    "Recipe": "btx.recipe",
    "RunFolder": "btx.rundir",
    "UserError": "btx.errors",
    "drop": "btx.drop",
    "extend": "btx.extend",
    "load_balancing_loss": "btx.balancing",
    "load_model": "btx.models",
    "load_recipe": "btx.recipe_loading",
    "load_tokenizer": "btx.models",
    "mix": "btx.mix",
    "plan": "btx.plan",
    "run": "btx.pipeline",
    "soup": "btx.mix",
    "top_k_gates": "btx.routers",
    "write_report": "btx.report",
}

__all__ = [
    "BtxError",
    "MoE",
    "Recipe",
    "RunFolder",
    "UserError",
    "drop",
    "extend",
    "load_balancing_loss",
    "load_model",
    "load_recipe",
    "load_tokenizer",
    "mix",
    "plan",
    "run",
    "soup",
    "top_k_gates",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'btx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Importing the submodule `btx.mix` would put it over the function `btx.mix`; the public name is the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
