"""What aligning a model has changed in where held-out text goes: the same tokens, routed before and after.

Shape letters: N text tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from btx.data.held_out import held_out_documents, pack
from btx.evaluation.routed_text import routing_of
from btx.files import write_json
from btx.models.device import measuring_place
from btx.models.outputs import MICRO_BATCH_TOKENS
from btx.models.placement import load_placed
from btx.moe.layer import moe_blocks
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
        folder: the file goes here.
        run_folder: holds the prepared data.
        recipe: the run's; `analyze.tokens` a domain at most.
        before: folder of the MoE model that was aligned.
        after: name → folder of what became of it.

    Raises:
        DataError: held-out data are missing.
    """
    experts_before, E = _routed(run_folder, recipe, before, log)
    models = {}
    for name, path in after.items():
        experts, _ = _routed(run_folder, recipe, path, log)
        models[name] = {domain: shift(experts_before[domain], experts[domain], E) for domain in experts}
        moved = [sum(domain["moved"]) / len(domain["moved"]) for domain in models[name].values()]
        log(f"{name}: {sum(moved) / len(moved):.1%} of the tokens have another first expert than before")
    aligned = AlignedRouting(before="btx", models=models)
    write_json(folder / FILE, aligned)
    return aligned


def shift(before: Sequence[Tensor], after: Sequence[Tensor], E: int) -> RoutingShift:
    """What has changed, layer by layer. The loads themselves are in evaluate/shown.json, as those of every model.

    Args:
        before: experts of each token (N, K), largest gate first, a tensor a layer.
        after: likewise, of the same tokens.
    """
    load_LE, was_LE = (torch.stack([ids.flatten().bincount(minlength=E).double() / ids.numel() for ids in layers])
                       for layers in (after, before))  # fmt: skip
    moved = [(now[:, 0] != then[:, 0]).double().mean().item() for now, then in zip(after, before, strict=True)]
    distance_L = (load_LE - was_LE).abs().sum(dim=1) / 2
    return RoutingShift(moved=moved, distance=distance_L.tolist())


def _routed(run_folder: Path, recipe: Recipe, path: Path, log: Log) -> tuple[dict[str, list[Tensor]], int]:
    """Domain → experts of its held-out text's tokens (N, K), a tensor a layer; and E."""
    model = load_placed(path, measuring_place(recipe, log))
    experts = {}
    for domain in recipe.data.domains:
        documents = held_out_documents(run_folder, recipe, domain, recipe.analyze.tokens)
        parts = [
            [routing.expert_ids_TK.cpu()[rows.text_BS.flatten()] for routing in routing_of(model, rows)]
            for rows in pack(documents, recipe.data.sequence_length).batches(MICRO_BATCH_TOKENS)
        ]
        experts[domain] = [torch.cat(layer) for layer in zip(*parts, strict=True)]
    return experts, moe_blocks(model)[0].num_experts
