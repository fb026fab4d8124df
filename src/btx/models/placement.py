"""Where a model that is measured lies: on one device where it fits, else its layers over all GPUs of this process, then
in host memory, then on disk.

accelerate spreads the layers, loads each where it belongs, moves a batch from one to the next, and brings what is not
on a GPU there for its turn (https://huggingface.co/docs/accelerate/concept_guides/big_model_inference). The numbers are
those of one device: the same products in the same order. It is slower: with GPUs alone because they take turns, with
host memory or disk because the weights there are copied in every forward pass.
"""

from __future__ import annotations

import gc
import logging
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from btx.errors import UserError
from btx.models.configs import read_config
from btx.models.cost import config_cost
from btx.models.free_memory import free_memory
from btx.models.loading import load_model
from btx.models.measuring_memory import SCORING, Reading, cache_bytes, forward_bytes
from btx.number_texts import bytes_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HOST, DISK = "cpu", "disk"
"""As accelerate calls them; GPUs are numbers."""
USABLE_SHARE = 0.93
"""Of what is free; the rest is lost between the allocator's blocks."""


@dataclass(frozen=True)
class Place:
    """Where and in which type models are loaded that are measured."""

    device: str = "cpu"
    """`cuda` (all GPUs that this process sees, as many as it takes) or `cpu`."""
    dtype: torch.dtype = torch.float32
    reading: Reading = SCORING
    """What has to fit beside the weights."""
    weights_per_device: int | None = None
    """Bytes of weights that a GPU is given at most, or the CPU where there is none; None: what fits."""
    log: Callable[[str], None] = lambda line: None
    """Called with a line for the user where a model is spread."""

    def shared_by(self, models: int) -> Place:
        """For one of several models that are there together."""
        limit = self.weights_per_device
        return self if limit is None else replace(self, weights_per_device=limit // models)


def load_placed(path: str | Path, place: Place) -> PreTrainedModel:
    """A model where it is measured: on the first device that has room for all of it, else spread.

    Tokens are read on `model.device`, whatever lies elsewhere; logits come back there.
    """
    cost, number = config_cost(read_config(path)), place.dtype.itemsize
    weights, forward = number * cost.total_params, forward_bytes(cost.shape, number, place.reading)
    cache = cache_bytes(cost.shape, number, place.reading)
    room = _room(place, forward + cache)
    if (device := _with_room(room, weights, place)) is None:
        gc.collect()  # a model that was spread before is gone only now: accelerate's hooks are cycles
        room = _room(place, forward + cache)
        device = _with_room(room, weights, place)
    if device is None:
        return _spread(path, place, weights, _room(place, forward + cache // max(1, len(room) - 1)))
    if weights > room[HOST]:  # a GPU that has more room than the host: straight there
        return load_model(path, dtype=place.dtype, max_memory={device: sys.maxsize})
    model = load_model(path, dtype=place.dtype)
    cast(nn.Module, model).to(torch.device("cuda", device) if isinstance(device, int) else torch.device(device))
    return model


def _with_room(room: Mapping[int | str, int], weights: int, place: Place) -> int | str | None:
    """The first device that computes and has room for all weights."""
    return next((where for where, free in room.items() if weights <= free and _computes(where, place)), None)


def _spread(path: str | Path, place: Place, weights: int, room: Mapping[int | str, int]) -> PreTrainedModel:
    import accelerate  # noqa: F401  # where it is missing, the error names it and no model

    folder = Path(tempfile.mkdtemp(prefix="btx-weights-"))
    try:
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # what it warns of is said below
        model = load_model(path, dtype=place.dtype, max_memory=room, offload_folder=folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    # Where there was more room by now than when it was measured, all of it lies on one device, without a map.
    where = getattr(model, "hf_device_map", None) or {"all": model.device}
    free = ", ".join(f"{bytes_text(room[name])} on {_name(name)}" for name in room if _computes(name, place))
    if cast(Any, model).get_input_embeddings().weight.is_meta:
        said = (f"{path}: of {bytes_text(weights)} of weights not even the embedding and the largest layer fit into "
                f"{free}")  # fmt: skip
        if place.device == HOST:
            raise UserError(f"{said}; it needs more memory, or a higher launch.weights_per_device")
        place.log(f"{said}: it is run on the CPU, which is slow")
        return load_placed(path, replace(place, device=HOST, weights_per_device=None))
    place.log(f"{path}: {bytes_text(weights)} of weights, room for {free}: {spread_text(where, folder)}")
    return model


def spread_text(places: Mapping[str, int | str | torch.device], folder: Path) -> str:
    """Which modules lie where, in words.

    Args:
        places: module → device.
        folder: what is on disk and had to be written anew lies there.
    """
    by_device: dict[str, list[str]] = {}
    for module, where in places.items():
        if not module.endswith("rotary_emb"):  # no weights
            by_device.setdefault(_name(where), []).append(module.rpartition("model.")[2])
    text = "; ".join(f"{_range(modules)} on {where}" for where, modules in by_device.items())
    host = any(isinstance(where, int) for where in places.values()) and _name(HOST) in by_device
    copied = [_name(HOST)] * host + [f"{DISK} ({folder} and the model's own files)"] * (DISK in by_device)
    return f"{text}. What is on {' and on '.join(copied)} is copied in every forward pass: slow" if copied else text


def _range(modules: list[str]) -> str:
    layers = [module.rpartition(".")[2] for module in modules if module.startswith("layers.")]
    others = [module for module in modules if not module.startswith("layers.")]
    spans = [f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"] if layers else []
    return ", ".join(spans + others)


def _room(place: Place, taken: int) -> dict[int | str, int]:
    """Bytes of weights that there is room for, by device, in the order in which they are filled; host memory last.

    Args:
        taken: what forward passes take on every device that computes.
    """
    most = sys.maxsize if place.weights_per_device is None else place.weights_per_device
    host = int(USABLE_SHARE * free_memory())
    if place.device != "cuda":
        return {HOST: max(0, min(host - taken, most))}
    room: dict[int | str, int] = {}
    for number in range(torch.cuda.device_count()):
        unused = torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number)
        free = torch.cuda.mem_get_info(number)[0] + unused
        room[number] = max(0, min(int(USABLE_SHARE * free) - taken, most))
    return room | {HOST: host}


def _computes(where: int | str, place: Place) -> bool:
    """Whether forward passes run there, not only weights lie there."""
    return place.device != "cuda" or where != HOST


def _name(where: int | str | torch.device) -> str:
    return (
        f"cuda:{where}" if isinstance(where, int) else {HOST: "host memory", DISK: "disk"}.get(str(where), str(where))
    )
