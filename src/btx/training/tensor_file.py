"""A safetensors file that is written later, by a thread, and hashed as it is written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from btx.model_files.direct_file import BUFFER_BYTES, DirectFile
from btx.model_files.shard_writer import file_header, tensor_bytes
from btx.training.host_memory import HostCopy


@dataclass(frozen=True)
class TensorFile:
    """What a file will hold; to be written once."""

    header: bytes
    pieces: Iterable[Tensor]
    """uint8: the bytes of its tensors, one after another."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], copy: HostCopy | None) -> TensorFile:
        """A file of these tensors as they are now, copied into `copy`; without one, as they are when it is written.

        Wide types come first, so that every tensor's place is a multiple of its element's size.
        """
        ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
        if copy is None:
            return cls(file_header(ordered), (tensor_bytes(tensor).cpu() for tensor in ordered.values()))
        copy.take(ordered.values())
        return cls(file_header(ordered), copy.pieces())

    def write(self, path: Path) -> str:
        """Write it; returns the SHA-256 of its bytes, which costs no second reading. Raises OSError."""
        sha256 = hashlib.sha256(self.header)
        with DirectFile(path) as file:
            file.write(self.header)
            for piece in self.pieces:
                for part in piece.split(BUFFER_BYTES):  # while one is hashed the disk writes those before
                    sha256.update(part.numpy().data)
                    file.write(part.numpy().data)
        return sha256.hexdigest()
