"""Files and folders that are either complete or absent: write beside, flush to the disk, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from btx.errors import RunFolderError


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON by rename: a reader sees the old file or the whole new one.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 by rename; raises as `write_json`."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with _writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """The JSON value in `path`, or None if there is no such file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunFolderError(f"{path}: not readable as JSON ({error}); remove it and run the stage again") from error


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill; it takes the place of `target` when the block ends without an error.

    A folder that was at `target` stays whole until then. Left-overs of killed writers are removed.

    Raises:
        RunFolderError: the disk is full or the parent cannot be written.
    """
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for left_over in target.parent.glob(f".{target.name}.*.tmp"):
            shutil.rmtree(left_over)
        beside = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        beside.mkdir()
        try:
            yield beside
            for file in beside.rglob("*"):
                _sync_file(file)
            old = target.parent / f".{target.name}.old.tmp"
            if target.exists():
                target.rename(old)
            beside.rename(target)
            _sync_folder(target.parent)
            if old.exists():
                shutil.rmtree(old)
        finally:
            if beside.exists():
                shutil.rmtree(beside)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def value_hash(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "I/O error" not in str(error):
            raise  # not about writing
        raise RunFolderError(
            f"{target}: cannot be written ({getattr(error, 'strerror', None) or error}); what was there before is "
            f"untouched. Free space or mend the permissions, then run the same command again"
        ) from error


def _sync_file(path: Path) -> None:
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make a rename durable; only POSIX can open a folder."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
