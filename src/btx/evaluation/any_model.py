"""A model that no run has made: where and in which type it is read, and whether rows may hold several texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from btx.baselines.btm_model import load_model_or_btm
from btx.model_files.model_folder import BTM_FILE
from btx.models.configs import as_the_files_say, read_config
from btx.models.device import choose_device
from btx.models.measuring_memory import ANSWERING, Reading
from btx.models.outputs import SideBySide
from btx.models.packed import packed_hidden
from btx.models.placement import Place
from btx.process import Log

if TYPE_CHECKING:
    from transformers import PreTrainedModel

APART = 0.01
"""Relative difference of hidden states below which a text was read the same beside another one."""


def load_any(path: str | Path, log: Log, reading: Reading = ANSWERING) -> PreTrainedModel | SideBySide:
    """A model on GPUs in its own type, where there are any; else on the CPU in float32."""
    place = Place(choose_device("auto").type, reading=reading, log=log)
    if place.device == "cpu" or (isinstance(path, Path) and (path / BTM_FILE).is_file()):
        return load_model_or_btm(path, place)
    config = read_config(path)
    if Path(path).is_dir():
        config = as_the_files_say(config, Path(path))
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."))
    return load_model_or_btm(path, replace(place, dtype=dtype))


@torch.inference_mode()
def keeps_apart(model: PreTrainedModel | SideBySide) -> bool:
    """Whether a model reads a text in the middle of a row as at its start, when positions begin anew there: looked at
    in two short rows, for classes with convolutions or states do not, whatever their attention does."""
    if isinstance(model, SideBySide):
        return True
    ids_BS = torch.arange(1, 25)[None] % min(64, int(cast(nn.Embedding, model.get_input_embeddings()).num_embeddings))
    positions_BS = torch.arange(12).repeat(2)[None]
    beside_D = packed_hidden(cast(nn.Module, model), ids_BS, positions_BS)[0, 12].float()
    alone_D = packed_hidden(cast(nn.Module, model), ids_BS[:, 12:], positions_BS[:, 12:])[0, 0].float()
    return bool((beside_D - alone_D).norm() <= APART * alone_D.norm())
