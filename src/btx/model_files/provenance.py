"""Where a mixed model comes from: its inputs' hashes and the versions of what made it. Plain Python.

Weights are not hashed whole: that would be another pass over all bytes at a speed of 1 to 2 GB/s and core, longer than
the mix itself. Instead a file's fingerprint is the SHA-256 of its size, its header (names, types and shapes of all
tensors) and evenly spaced samples of its data. Any training step changes nearly all weights, so other weights have
another fingerprint; a single flipped byte can go unnoticed. Files of the Hugging Face cache are stored under their
full SHA-256, which costs nothing to note.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from btx import __version__
from btx.files import file_sha256, value_hash
from btx.model_files.adapter_folder import CONFIG, AdapterFolder
from btx.model_files.hub import hub_origin

SAMPLES = 256
SAMPLE_BYTES = 16 * 1024
HASHED_WHOLE = ("config.json", "adapter_config.json", "tokenizer.json")
DISTRIBUTION = "branchtrainmix"
"""The name that btx is installed by."""
PACKAGES = (DISTRIBUTION, "torch", "transformers", "safetensors")


def model_provenance(folder: Path) -> dict[str, Any]:
    """Name and hashes of a model folder's files."""
    files = [file_provenance(file) for file in sorted(folder.glob("*.safetensors"))]
    whole = {name: file_sha256(folder / name) for name in HASHED_WHOLE if (folder / name).is_file()}
    origin = hub_origin(folder)
    return {"path": str(folder), **({"hub": origin} if origin else {}), "sha256": whole, "weights": files}


def weights_fingerprint(folder: Path) -> str:
    """One hash for the weights of a model folder: of the fingerprints of all its files."""
    return value_hash({file.name: sampled_sha256(file) for file in sorted(folder.glob("*.safetensors"))})


def other_base(adapter: AdapterFolder, seed_model: Path) -> str | None:
    """What is taken on trust where an adapter does not name this seed model as the one it was trained on; None if it
    does: the same folder, the same weights in another one, or a hub name under which the hub's cache has this one."""
    file, base = adapter.folder / CONFIG, adapter.base
    if base is None:
        return f"{file}: names no base model; taken to be trained on {seed_model}: all shapes fit"
    if Path(base).is_dir() and weights_fingerprint(Path(base)) == weights_fingerprint(seed_model):
        return None
    if f"models--{base.replace('/', '--')}" in Path(os.path.realpath(seed_model)).parts:
        return None
    return f"{file}: was trained on {base}; taken to be the same as {seed_model}: all shapes fit"


def file_provenance(file: Path) -> dict[str, Any]:
    """Name, size and fingerprint of a safetensors file; its full SHA-256 if the Hugging Face cache tells it."""
    stored_as = file.resolve().name
    known = {"sha256": stored_as} if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", stored_as) else {}
    return {"file": file.name, "bytes": file.stat().st_size, "sampled_sha256": sampled_sha256(file), **known}


def sampled_sha256(file: Path) -> str:
    """SHA-256 of a safetensors file's size, its header and `SAMPLES` evenly spaced samples of `SAMPLE_BYTES` bytes; of
    all its bytes if the samples would cover them."""
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with open(file, "rb") as opened:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(opened.read())
            return digest.hexdigest()
        header_bytes = int.from_bytes(opened.read(8), "little")
        digest.update(opened.read(header_bytes))
        start = 8 + header_bytes
        for number in range(SAMPLES):
            opened.seek(start + (size - start - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Python and the packages that decide the result."""
    return {"python": platform.python_version()} | package_versions(PACKAGES)


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Package → version. btx's own is that of the code that runs: a plain source tree is not installed, and what is
    installed may be another copy."""
    return {name: __version__ if name == DISTRIBUTION else metadata.version(name) for name in names}
