"""Routers from text: run the mixed model over every expert's text, sum up what its routers see, solve, write.

Which hidden states? Those at the router's input of the mixed model itself, its shared weights merged, while all experts
of every layer take equal parts: what a layer will see when the routers before it are undecided. On the demo this beat
hidden states of the mixed model with random routers, and of one in which each text went to its own expert.

One layer's sums are D x D numbers; text streams through in a few rows at a time, on a GPU in some thousand tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from btx.choices.families import Family
from btx.choices.router_inits import RouterInit
from btx.choices.routers import RoutingRule
from btx.data.expert_text import ROWS_AT_ONCE, TextRows
from btx.errors import CheckpointError
from btx.mixing.router_init import FROM_TEXT, RouterSums
from btx.model_files.checkpoints import TensorFolder
from btx.model_files.lazy_tensors import rounded
from btx.models.free_memory import free_memory
from btx.models.measuring_memory import FITTING, SCORING
from btx.models.packed import packed_hidden
from btx.models.placement import Place, load_placed
from btx.moe.any_moe import blocks_with_routers
from btx.moe.routers import LayerRule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Targets = Callable[[int, int, Tensor], Tensor]
"""(layer, number of the text, router inputs (T, D)) → what the router should say of them, (T, E)."""


def check_texts(texts: Mapping[str, Any] | None, experts: Sequence[str], method: str) -> None:
    """Refuse missing and surplus texts."""
    named = list(texts or ())
    missing = [name for name in experts if name not in named]
    unknown = [name for name in named if name not in experts]
    if missing or unknown:
        parts = [f"no text for {', '.join(missing)}"] if missing else []
        parts += [f"text for {', '.join(unknown)}, which is no expert"] if unknown else []
        raise CheckpointError(
            f"router_init {method} needs text of every expert's domain: {'; '.join(parts)}. Give --text NAME=FILE for "
            f"each of: {', '.join(experts)} (the generalist's is general text)"
        )


def fit_routers(
    folder: Path, family: Family, texts: Sequence[TextRows], owners: Sequence[int], init: RouterInit, place: Place
) -> None:
    """Compute the routers of the MoE model in `folder` from text and write them into its files.

    Args:
        folder: a complete MoE folder that nobody else reads yet; the routers in it do not matter.
        owners: for every expert of a layer the number of the text that is its own.
        place: where the model runs, as far as there is room for it.
    """
    model = load_for_text(folder, place)

    def labels(layer: int, text: int, x_TD: Tensor) -> Tensor:
        return torch.tensor([float(owner == text) for owner in owners], device=x_TD.device).expand(len(x_TD), -1)

    with experts_in_equal_parts(model):
        sums = router_sums(model, texts, len(owners), labels)
    write_routers(folder, family, [FROM_TEXT[init.method](layer, init) for layer in sums])


def load_for_text(folder: Path, place: Place) -> PreTrainedModel:
    """The mixed model where routers are fitted, in float32 if that fits into two thirds of the free memory of its
    devices, else in its own type."""
    tensors = TensorFolder(folder)
    elements = sum(tensors[name].numel for name in tensors.names)
    free = free_memory()
    if place.device == "cuda":
        free = sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
    own_type = tensors[tensors.names[0]].dtype
    dtype = torch.float32 if 4 * elements < free * 2 / 3 else own_type
    return load_placed(folder, replace(place, dtype=dtype, reading=FITTING if place.device == "cuda" else SCORING))


@torch.inference_mode()
def router_sums(
    model: PreTrainedModel, texts: Sequence[TextRows], num_targets: int, targets: Targets
) -> list[RouterSums]:
    """Sums over the router inputs of every MoE layer; each text counts the same, whatever its length.

    Tokens at position 0 are left out: document separators, which are alike in every domain. On a GPU products of the
    model are in bfloat16, those of the sums in float32.
    """
    device, routers = model.device, blocks_with_routers(model)
    in_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    sums: list[RouterSums | None] = [None] * len(routers)  # each where its layer is, which the first batch says
    now: dict[str, Any] = {}

    def hook(layer: int) -> Callable[[Any, tuple[Tensor]], None]:
        def take(module: Any, inputs: tuple[Tensor]) -> None:
            with torch.autocast(device.type, enabled=False):
                x_TD = inputs[0].flatten(0, -2)
                x_TD = x_TD[now["counting"].to(x_TD.device)]
                total = sums[layer] or RouterSums.zeros(x_TD.shape[1], num_targets, x_TD.device)
                total.add(x_TD, targets(layer, now["text"], x_TD), now["weight"])
                sums[layer] = total

        return take

    # First of all hooks: what comes after may change what the router sees.
    handles = [router.register_forward_pre_hook(hook(layer), prepend=True) for layer, (_, router) in enumerate(routers)]
    try:
        for number, text in enumerate(texts):
            now.update(text=number, weight=1.0 / text.tokens)
            rows = ROWS_AT_ONCE if device.type == "cpu" else max(1, FITTING.tokens // text.input_ids_BS.shape[1])
            for input_ids, position_ids in text.batches(rows):
                # Places, not a mask: a GPU that selects by a mask has to tell the host how many there are.
                now["counting"] = torch.from_numpy(position_ids).flatten().nonzero().flatten().to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16):
                    packed_hidden(model, torch.from_numpy(input_ids), torch.from_numpy(position_ids))
    finally:
        for handle in handles:
            handle.remove()
    return [total for total in sums if total is not None]


@contextlib.contextmanager
def experts_in_equal_parts(model: PreTrainedModel) -> Iterator[None]:
    """All experts of every MoE layer with the same gate weight, 1/E."""
    with contextlib.ExitStack() as undo:
        for block, router in blocks_with_routers(model):
            E = len(next(parameter for parameter in router.parameters() if parameter.dim() == 2))
            for part, name, value in ((block, "rule", LayerRule(RoutingRule(top_k=E))), (block, "top_k", E),
                                      (router, "top_k", E)):  # fmt: skip
                if hasattr(part, name):  # a rule in btx's blocks, a number in those of transformers
                    undo.callback(setattr, part, name, getattr(part, name))
                    setattr(part, name, value)
            undo.callback(router.register_forward_pre_hook(_nothing_in).remove)
        yield


def _nothing_in(router: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A router that sees zeros has logits of zero. Its weights need not be there: they may lie in host memory."""
    return torch.zeros_like(inputs[0]), *inputs[1:]


def write_routers(folder: Path, family: Family, weights: Sequence[Tensor]) -> None:
    """Overwrite the routers of a MoE folder in its files, a layer each: their places and sizes stay the same."""
    tensors = TensorFolder(folder)
    for layer, weight_ED in enumerate(weights):
        router = tensors[family.router.format(layer=layer)]
        assert router.shape == tuple(weight_ED.shape), f"{router.shape} in the file, {tuple(weight_ED.shape)} computed"
        with open(router.file, "r+b") as file:
            file.seek(router.offset)
            file.write(rounded(weight_ED.cpu(), router.dtype).contiguous().view(torch.uint8).numpy().tobytes())
