"""btx: Branch-Train-MiX (arXiv 2403.07816) for Hugging Face models.

    import btx

    recipe = btx.load_recipe("demo")
    run = btx.run(recipe)                              # everything, from nothing to a report
    btx.mix(seed, {"math": math, "code": code}, out)   # or one step, on anybody's checkpoints
    model = btx.load_model(out)
    btx.compare(run).to_pandas()                       # what a command prints is a typed result here

Names are imported when they are used, so that `import btx` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from btx.errors import BtxError, UserError
    from btx.mixing.drop import drop
    from btx.mixing.extend import extend
    from btx.mixing.mix import mix, soup
    from btx.models.loading import load_model, load_tokenizer
    from btx.moe.balancing import load_balancing_loss
    from btx.moe.layer import MoE
    from btx.moe.routers import top_k_gates
    from btx.planning.plan import plan
    from btx.python.commands import adopt, align, analyze, compare, evaluate, sweep
    from btx.recipe.loading import load_recipe
    from btx.recipe.schema import Recipe
    from btx.reporting.report import write_report
    from btx.run_folder.folder import RunFolder
    from btx.running.pipeline import run

__version__ = "0.1.0"

_HOME = {
    "BtxError": "btx.errors",
    "MoE": "btx.moe.layer",
    "Recipe": "btx.recipe.schema",
    "RunFolder": "btx.run_folder.folder",
    "UserError": "btx.errors",
    "adopt": "btx.python.commands",
    "align": "btx.python.commands",
    "analyze": "btx.python.commands",
    "compare": "btx.python.commands",
    "drop": "btx.mixing.drop",
    "evaluate": "btx.python.commands",
    "extend": "btx.mixing.extend",
    "load_balancing_loss": "btx.moe.balancing",
    "load_model": "btx.models.loading",
    "load_recipe": "btx.recipe.loading",
    "load_tokenizer": "btx.models.loading",
    "mix": "btx.mixing.mix",
    "plan": "btx.planning.plan",
    "run": "btx.running.pipeline",
    "soup": "btx.mixing.mix",
    "sweep": "btx.python.commands",
    "top_k_gates": "btx.moe.routers",
    "write_report": "btx.reporting.report",
}

__all__ = [
    "BtxError",
    "MoE",
    "Recipe",
    "RunFolder",
    "UserError",
    "adopt",
    "align",
    "analyze",
    "compare",
    "drop",
    "evaluate",
    "extend",
    "load_balancing_loss",
    "load_model",
    "load_recipe",
    "load_tokenizer",
    "mix",
    "plan",
    "run",
    "soup",
    "sweep",
    "top_k_gates",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'btx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
