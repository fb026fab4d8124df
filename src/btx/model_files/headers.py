"""Which tensors a model folder holds, by the headers of its safetensors files. Plain Python, no torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from btx.errors import CheckpointError
from btx.system_errors import blame

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of weights, as safetensors and as torch call them."""
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Masks, positions and rope frequencies that old models hold and every class of today computes.
COMPUTED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias",
            "position_ids")  # fmt: skip
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_BLOCK = 2**24


class Entry(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: str
    """As safetensors writes it: F32, BF16, I8, ..."""
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Headers:
    """The tensors of a model folder: name → `Entry`, in `tensors`.

    Raises:
        CheckpointError: no safetensors, a missing, empty or truncated shard, an index that names absent tensors, a
            tensor that two shards hold.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Entry] = {}
        self.file = folder / ONE_FILE
        """The file that says which tensors there are, for messages."""
        if self.file.is_file():  # transformers too looks for the single file first
            self.tensors |= read_header(self.file)
        elif (folder / INDEX).is_file():
            self.file = folder / INDEX
            self._read_shards(self.file)
        else:
            raise CheckpointError(f"{folder}: no weights: neither {ONE_FILE} nor {INDEX}")

    def _read_shards(self, index: Path) -> None:
        try:
            listed = json.loads(index.read_text("utf-8"))["weight_map"]
            files = sorted(set(listed.values()))
            if not all(isinstance(file, str) for file in files):
                raise TypeError("a shard's name is no text")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            blame(error)
            raise CheckpointError(f"{index}: not a safetensors index: {error!r}") from error
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"shard {file!r} lies outside the folder (named by {index})")
            try:
                entries = read_header(self.folder / file)
            except CheckpointError as error:
                raise CheckpointError(f"{error} (named by {index})") from error
            if twice := sorted(entries.keys() & self.tensors.keys()):
                other = self.tensors[twice[0]].file
                raise CheckpointError(f"{self.folder / file}: holds {twice[0]}, which {other} holds too; one is stale")
            self.tensors |= entries
        absent = [name for name in sorted(listed)
                  if name not in self.tensors or self.tensors[name].file.name != listed[name]]  # fmt: skip
        if absent:
            named = ", ".join(f"{name} ({listed[name]})" for name in absent[:5])
            raise CheckpointError(f"{index}: names tensors that their shard does not hold: {named}")


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file; raises CheckpointError if it cannot be read."""
    try:
        with path.open("rb") as file:  # first: the library says of any file it cannot open that it is missing
            with safe_open(path, framework="np"):  # its checks
                pass
            header_bytes = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(header_bytes))
    except (OSError, SafetensorError, ValueError) as error:
        blame(error)
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return {
        name: Entry(path, entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def main_type(headers: Headers) -> str:
    """The type of most weights, as torch calls it; float32 where there are none."""
    counts: Counter[str] = Counter()
    for entry in headers.tensors.values():
        counts[FLOATS.get(entry.dtype, "float32")] += entry.numel
    return counts.most_common(1)[0][0] if counts else "float32"


def check_unquantised(folder: Path, config: Mapping[str, Any], headers: Headers | None = None) -> None:
    """Refuse weights that are integers, 8-bit floats or codes: read as weights they are another model."""
    for key in QUANTIZATION_KEYS:
        if config.get(key):
            known = config[key].get("quant_method") if isinstance(config[key], dict) else None
            method = f" ({known})" if known else ""
            raise CheckpointError(f"{folder / 'config.json'}: {key}: give the unquantised model; these weights are "
                                  f"quantised{method}")  # fmt: skip
    for name, entry in sorted(headers.tensors.items() if headers is not None else ()):
        if entry.dtype not in FLOATS and not name.endswith(COMPUTED):
            raise CheckpointError(
                f"{entry.file}: {name} is of type {entry.dtype}; weights have to be floating point: "
                f"{', '.join(FLOATS)}. If they are quantised, give the unquantised model"
            )


def has_own_head(headers: Headers) -> bool:
    """Whether the LM head has other values than the embeddings: a config that ties the two does not say what is there.

    transformers 5 then takes the head, older readers drop it. A copy of the embeddings is harmless.
    """
    head = headers.tensors.get(HEAD)
    embeddings = next((entry for name, entry in sorted(headers.tensors.items()) if name.endswith(EMBEDDINGS)), None)
    if head is None or embeddings is None:
        return False
    if (head.dtype, head.shape) != (embeddings.dtype, embeddings.shape):
        return True
    places = [(entry.file, entry.file.stat().st_mtime_ns, entry.start) for entry in (head, embeddings)]
    return not _same_bytes(places[0], places[1], head.numel * BYTES.get(head.dtype, 1))


@cache
def _same_bytes(one: tuple[Path, int, int], other: tuple[Path, int, int], size: int) -> bool:
    """Whether two files, each with its time of change and a place in it, hold the same bytes there."""
    with one[0].open("rb") as first, other[0].open("rb") as second:
        first.seek(one[2])
        second.seek(other[2])
        for start in range(0, size, _BLOCK):
            block = min(_BLOCK, size - start)
            if first.read(block) != second.read(block):
                return False
    return True
