"""What measuring each model of a run takes of a GPU's memory, and how many GPUs hold it if one does not."""

from __future__ import annotations

from typing import Any

from btx.choices.baselines import BTM
from btx.models.measuring_memory import ANSWERING, SCORING, cache_bytes, forward_bytes
from btx.planning.gpu_memory import usable
from btx.planning.models import cost_in_use
from btx.recipe.schema import Recipe
from btx.run_folder.finished_models import model_stages

MOST_GPUS = 1024


def measuring_rows(recipe: Recipe, dense: dict[str, Any], gpu_memory: int) -> list[dict[str, Any]]:
    """A row a model of the results: {"model", "memory_bytes": weights and a forward pass on one GPU, "weights_bytes",
    "fits", "gpus": the fewest whose memory holds it together, None where no number does: then host memory or disk holds
    the rest}.

    Args:
        dense: the seed model's config, completed with its class's defaults.
        gpu_memory: bytes.
    """
    return [_row(recipe, dense, name, usable(gpu_memory)) for name in model_stages(recipe)]


def _row(recipe: Recipe, dense: dict[str, Any], name: str, room: int) -> dict[str, Any]:
    cost, number = cost_in_use(recipe, dense, name), bytes_of_a_number(recipe)
    reading = ANSWERING if recipe.evaluate.tasks or recipe.evaluate.harness.tasks else SCORING
    weights, forward = number * cost.total_params, forward_bytes(cost.shape, number, reading)
    cache = cache_bytes(cost.shape, number, reading) * (len(recipe.member_names) if name in BTM else 1)
    # accelerate cuts between layers, and the first GPU keeps room for one more.
    layer = number * max(sum(cost.shape.total.values()) // cost.shape.layers, cost.shape.vocabulary * cost.shape.width)
    one = weights + forward + cache
    several = (gpus for gpus in range(2, MOST_GPUS + 1) if gpus * (room - forward - layer - cache // gpus) >= weights)
    return {
        "model": name, "memory_bytes": one, "weights_bytes": weights, "fits": one <= room,
        "gpus": 1 if one <= room else next(several, None),
    }  # fmt: skip


def bytes_of_a_number(recipe: Recipe) -> int:
    """Of a model that is measured on a GPU with units for bfloat16, whatever this machine has."""
    precision = recipe.evaluate.precision
    return 4 if (recipe.finetune.precision if precision == "auto" else precision) == "float32" else 2
