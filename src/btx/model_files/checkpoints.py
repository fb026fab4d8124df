"""The tensors of a model folder, by name, from safetensors files that are mapped and read when needed."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from btx.errors import CheckpointError
from btx.model_files.headers import COMPUTED, FLOATS, HEAD, Headers, check_unquantised
from btx.model_files.lazy_tensors import FileTensor, OpenFile

DTYPES = {name: getattr(torch, known_as) for name, known_as in FLOATS.items()}


SPARE_FILES = 32
"""Files that are open for a moment beside the weights: the output, libraries."""


def allow_open_files(folders: Iterable[Path]) -> None:
    """Let this process open the weights of all these folders at once: the system's soft limit is raised where it is too
    low. A folder that is given twice has its files open once.

    Raises:
        CheckpointError: the hard limit is lower; with both numbers.
    """
    weights = {os.path.realpath(file) for folder in set(folders) for file in folder.glob("*.safetensors")}
    needed = psutil.Process().num_fds() + 2 * len(weights) + SPARE_FILES  # open, and mapped, which takes another number
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise CheckpointError(
            f"too many open files: the models' {len(weights):,} files of weights are read at the same time, which "
            f"needs {needed:,} open files, and this system allows a process {hard:,}. Raise the hard limit (`ulimit -n "
            f"{needed}` as root, LimitNOFILE of a service), or save the models in larger shards (max_shard_size)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class TensorFolder:
    """The tensors of a model folder, read lazily by name; those that every class computes itself are left out.

    Args:
        folder: as `save_pretrained` writes it.
        who: whose tensors these are, for messages found while they are read.

    Raises:
        CheckpointError: as `Headers`; weights that are quantised.
    """

    def __init__(self, folder: Path, who: str = "model") -> None:
        self.folder = folder
        self.who = who
        headers = Headers(folder)
        check_unquantised(folder, {}, headers)
        self.file = headers.file
        """The file that says which tensors there are, for messages."""
        opened = {file: OpenFile.shared(file) for file in {entry.file for entry in headers.tensors.values()}}
        self._tensors = {
            name: FileTensor(
                who, name, str(entry.file), entry.shape, DTYPES[entry.dtype], opened[entry.file], entry.start
            )
            for name, entry in headers.tensors.items() if not name.endswith(COMPUTED)
        }  # fmt: skip

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> FileTensor:
        return self._tensors[name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def where(self, name: str) -> str:
        """File a tensor lies in, for messages."""
        return self._tensors[name].file

    def leave_out_tied_head(self, config: Mapping[str, Any]) -> None:
        """Leave out a copy of the embeddings as an LM head, where the config ties the two."""
        if config.get("tie_word_embeddings"):
            self._tensors.pop(HEAD, None)

    def replace(self, tensor: FileTensor) -> None:
        """Put another tensor in the place of the one of its name."""
        self._tensors[tensor.name] = tensor

    def split(self, name: str, parts: dict[str, int]) -> None:
        """Replace a fused tensor by the tensors it consists of: name → number of rows, in order."""
        fused, start = self._tensors[name], 0
        if sum(parts.values()) != fused.shape[0]:
            raise CheckpointError(
                f"{fused.file}: {name} has {fused.shape[0]} rows; the config asks for {sum(parts.values())}"
            )
        del self._tensors[name]
        for part, rows in parts.items():
            self._tensors[part] = fused.rows(start, start + rows)
            start += rows
