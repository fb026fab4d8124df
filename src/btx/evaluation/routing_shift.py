"""What aligning a model has changed in where held-out text goes: the same tokens, routed before and after.

Shape letters: T text tokens, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from btx.data.held_out import held_out_documents
from btx.evaluation.analyze import domain_routing
from btx.files import write_json
from btx.models.device import measuring_place
from btx.models.placement import load_placed
from btx.process import Log
from btx.reporting.shapes import AlignedRouting, RoutingShift

if TYPE_CHECKING:
    from btx.recipe.schema import Recipe

FILE = "align.json"


def write_routing_shift(
    folder: Path, run_folder: Path, recipe: Recipe, before: Path, after: Mapping[str, Path], log: Log
) -> AlignedRouting:
    """Route held-out text of every domain through a model before and after it was aligned; writes align.json.

    Args:
        recipe: the run's; `analyze.tokens` a domain at most.
        before: folder of the MoE model that was aligned.
        after: name → folder of what became of it.
    """
    routed = _routed(run_folder, recipe, before, log)
    models = {}
    for name, path in after.items():
        now = _routed(run_folder, recipe, path, log)
        models[name] = {domain: shift(*routed[domain], *now[domain]) for domain in now}
        moved = [sum(domain["moved"]) / len(domain["moved"]) for domain in models[name].values()]
        log(f"{name}: {sum(moved) / len(moved):.1%} of the tokens have another first expert than before")
    aligned = AlignedRouting(before="btx", models=models)
    write_json(folder / FILE, aligned)
    return aligned


def shift(was_LE: Tensor, was_first_TL: np.ndarray, load_LE: Tensor, first_TL: np.ndarray) -> RoutingShift:
    """What has changed, layer by layer. The loads themselves are in evaluate/shown.json, as those of every model.

    Args:
        was_LE: share of each expert before.
        was_first_TL: expert with the largest gate of each token before.
        load_LE: share of each expert after.
        first_TL: expert with the largest gate of each token after, the same tokens.
    """
    distance_L = (load_LE - was_LE).abs().sum(dim=1) / 2
    return RoutingShift(moved=(first_TL != was_first_TL).mean(axis=0).tolist(), distance=distance_L.tolist())


def _routed(run_folder: Path, recipe: Recipe, path: Path, log: Log) -> dict[str, tuple[Tensor, np.ndarray]]:
    """Domain → load (L, E) and first experts (T, L) of its held-out text."""
    model = load_placed(path, measuring_place(recipe, log))
    routed = {}
    for domain in recipe.data.domains:
        documents = held_out_documents(run_folder, recipe, domain, recipe.analyze.tokens)
        totals, tokens = domain_routing(model, documents, recipe.data.sequence_length)
        routed[domain] = totals.load(), tokens.ids_TLK[:, :, 0]
    return routed
