"""Files and folders that are either complete or absent: write beside, flush to the disk, rename. What a file holds,
whatever it is called and whenever it was written: its SHA-256, kept until the file changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
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
    except (FileNotFoundError, NotADirectoryError):
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


def home_filled(path: str) -> Path:
    """A path with `~` filled in; one of a user that does not exist stays as it is, and will not be found."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (pathlib's raises)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, computed anew only if the file may have changed since it was last asked for.

    Like git's index, it is kept beside the file's size, times, inode and device: nobody can set the time of a file's
    last change (ctime), so a file that looks the same is the same. They lie in the user's cache folder, a small file
    each; where that cannot be written, every process computes its own. A file that is younger than `YOUNG_S` might
    still change within one tick of the clock and is not kept.
    """
    found = path.stat()
    seen = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]
    name = str(path.absolute())
    if name in _hashed and _hashed[name][0] == seen:
        return _hashed[name][1]
    kept = _cache_file(name)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        record = json.loads(kept.read_text("utf-8")) if kept is not None else {}
        if record["path"] == name and record["seen"] == seen:
            _hashed[name] = (seen, str(record["sha256"]))
            return _hashed[name][1]
    young = time.time() - found.st_ctime < YOUNG_S
    sha256 = file_sha256(path)
    if not young:
        _hashed[name] = (seen, sha256)
        if kept is not None:
            with contextlib.suppress(RunFolderError):
                write_json(kept, {"path": name, "seen": seen, "sha256": sha256})
    return sha256


YOUNG_S = 2.0
"""Seconds after its last change for which a file's hash is not kept."""
_hashed: dict[str, tuple[list[int], str]] = {}
"""Absolute path → what the file looked like, and its hash: those that this process has asked for."""


def _cache_file(name: str) -> Path | None:
    """Where the hash of the file with this absolute path is kept: in XDG_CACHE_HOME, else in ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with contextlib.suppress(RuntimeError):  # nobody's home
        return base.expanduser() / "btx" / "sha256" / f"{hashlib.sha256(name.encode()).hexdigest()}.json"
    return None


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
