"""The tensors of a model folder, by name, from safetensors files that are mapped and read when needed."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open

from btx.errors import CheckpointError
from btx.model_files.lazy_tensors import FileTensor, OpenFile

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


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
    """The tensors of a model folder, read lazily by name.

    Args:
        folder: as `save_pretrained` writes it.
        who: whose tensors these are, for messages found while they are read.

    Raises:
        CheckpointError: no safetensors, a missing, empty or truncated shard, an index that names absent tensors.
    """

    def __init__(self, folder: Path, who: str = "model") -> None:
        self.folder = folder
        self.who = who
        self._tensors: dict[str, FileTensor] = {}
        self.file = folder / ONE_FILE
        """The file that says which tensors there are, for messages."""
        if self.file.is_file():  # transformers too looks for the single file first
            self._open(ONE_FILE)
        elif (folder / INDEX).is_file():
            self.file = folder / INDEX
            self._open_index(self.file)
        else:
            raise CheckpointError(f"{folder}: no weights: neither {ONE_FILE} nor {INDEX}")

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> FileTensor:
        return self._tensors[name]

    def where(self, name: str) -> str:
        """File a tensor lies in, for messages."""
        return self._tensors[name].file

    def drop(self, name: str) -> None:
        """Leave a tensor out."""
        del self._tensors[name]

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

    def _open_index(self, index: Path) -> None:
        try:
            listed = json.loads(index.read_text("utf-8"))["weight_map"]
            files = sorted(set(listed.values()))
            if not all(isinstance(file, str) for file in files):
                raise TypeError("a shard's name is no text")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index: {error!r}") from error
        for file in files:
            try:
                self._open(file)
            except CheckpointError as error:
                raise CheckpointError(f"{error} (named by {index})") from error
        absent = sorted(
            name for name, file in listed.items()
            if name not in self._tensors or self._tensors[name].file != str(self.folder / file)
        )  # fmt: skip
        if absent:
            named = ", ".join(f"{name} ({listed[name]})" for name in absent[:5])
            raise CheckpointError(f"{index}: names tensors that their shard does not hold: {named}")

    def _open(self, file: str) -> None:
        path = self.folder / file
        if Path(file).name != file:
            raise CheckpointError(f"shard {file!r} lies outside the folder")
        try:
            opened = OpenFile.shared(path)  # first: the library says of any file it cannot open that it is missing
            with safe_open(path, framework="np"):  # the library's checks of the header
                pass
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
        header_bytes = int.from_bytes(opened.read(0, 8).numpy().tobytes(), "little")
        header = json.loads(opened.read(8, header_bytes).numpy().tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(f"{path}: tensor {name} is of type {entry['dtype']}; known: {', '.join(DTYPES)}")
            self._tensors[name] = FileTensor(
                self.who, name, str(path), tuple(entry["shape"]), DTYPES[entry["dtype"]], opened,
                8 + header_bytes + entry["data_offsets"][0],
            )  # fmt: skip
