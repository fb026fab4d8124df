"""Files and folders that are either complete or absent: write beside, flush to the disk, rename. What a file holds,
whatever it is called and whenever it was written: its SHA-256, kept until the file changes. JSON files that say
themselves whether they are still as they were written.

What is written beside `NAME` is called `.NAME.<8 hex digits>.tmp`. A folder is locked by its writer for as long as that
lives, so the next writer of the same name tells a left-over from work that is under way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from btx.errors import BtxError, RunFolderError
from btx.system_errors import OPEN_FILES, WRITING, error_number, temporary_is_full

if TYPE_CHECKING:
    from pydantic import TypeAdapter

WRITTEN_BESIDE = re.compile(r"\.(.+?)\.(making|adopting|replaced|(?:[0-9a-f]{8}|old)\.tmp)")
"""Names of what is written beside a file or folder to take its place, and of what gives way: that one's name, and what
kind it is."""


def named_beside(target: Path, kind: str) -> Path:
    """Path of what takes the place of `target`, or gives way to it: `.NAME.KIND`, as `WRITTEN_BESIDE` reads it."""
    return target.with_name(f".{target.name}.{kind}")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON by rename: a reader sees the old file or the whole new one.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 as `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file by rename; raises as `write_json`. Folders are made where needed, but none that is written beside
    another: who has removed it does not want it back."""
    with writing(path):
        if not WRITTEN_BESIDE.fullmatch(path.parent.name):
            above = any(WRITTEN_BESIDE.fullmatch(part) for part in path.parent.parts)
            path.parent.mkdir(parents=not above, exist_ok=True)
        with atomic_file(path) as beside:
            beside.write_bytes(content)
        _sync_folder(path.parent)
        remove_left_overs(path.parent, re.escape(path.name))


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Where to write a file; it takes the place of `target` when the block ends without an error."""
    beside = _beside(target)
    try:
        yield beside
        _sync_file(beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


SEAL = "seal"
"""Key of a sealed JSON file that holds the hash of all its other keys."""


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with a hash of itself: `read_json` notices a changed digit. Raises as `write_json`."""
    plain = json.loads(json.dumps(dict(value), allow_nan=False))
    write_json(path, plain | {SEAL: value_hash(plain)})


def read_json(path: Path, shape: Any = None) -> Any:
    """The JSON value in `path`, without its seal, or None if there is no such file.

    The one reader of what a run folder, a sweep or a mix keeps in JSON.

    Args:
        shape: a TypedDict, or another type: what the value must be. Keys that it does not name may be there.

    Raises:
        RunFolderError: the file is unreadable, no JSON, not of this shape (the message names the key), or sealed and
            changed since.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path}: not readable as JSON ({error}); {MEND}") from error
    if isinstance(value, dict) and SEAL in value and value.pop(SEAL) != value_hash(value):
        raise RunFolderError(f"{path}: changed since btx wrote it: its {SEAL} does not fit; {MEND}")
    if shape is not None:
        check_shape(path, value, shape)
    return value


def check_shape(path: Path, value: Any, shape: Any) -> None:
    """Refuse a value that was read from `path`; `shape` and error as in `read_json`."""
    if problem := misfit(value, shape):
        raise RunFolderError(f"{path}: {problem}; {MEND}")


MEND = "restore it from a copy, or remove it and run the stage again"


def misfit(value: Any, shape: Any) -> str:
    """What of a value of JSON or YAML is not of a shape: the key and what it should be; empty if all is."""
    from pydantic import ValidationError  # no part of `btx --help`

    try:
        _validator(shape).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        instead = "" if first["type"] == "missing" else f", found {json.dumps(first['input'], default=str)[:60]}"
        return f"{key + ': ' if key else ''}{first['msg'][0].lower()}{first['msg'][1:]}{instead}"
    return ""


@cache
def _validator(shape: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


LINKED = {".safetensors", ".bin", ".npy", ".npz"}
"""Endings of the large files, which are never altered in place."""


def link_or_copy(source: Path, target: Path) -> None:
    """Let a folder hold all that another holds: large files as hard links where the file system has them, others as
    copies, and links as they are."""
    for path in sorted(source.rglob("*")):
        there = target / path.relative_to(source)
        if path.is_symlink():  # an existing seed model is a link to its folder
            there.symlink_to(path.readlink(), target_is_directory=path.is_dir())
        elif path.is_dir():
            there.mkdir(exist_ok=True)
        else:
            if path.suffix in LINKED:
                with contextlib.suppress(OSError):  # another disk, or one without hard links
                    os.link(path, there)
                    continue
            shutil.copy2(path, there)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill; it takes the place of `target` when the block ends without an error.

    A folder that was at `target` stays whole until then. Left-overs of killed writers of the same target are removed.

    Raises:
        RunFolderError: the disk is full, the parent cannot be written, or somebody has removed the new folder or
            written `target` meanwhile.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_left_overs(target.parent, re.escape(target.name))
        before = _inode(target)
        beside, handle = _locked_folder(target)
        try:
            yield beside
            if _inode(beside) != os.fstat(handle).st_ino:
                raise RunFolderError(f"{target}: somebody removed {beside.name} while it was written; nothing is "
                                     f"there now. Run the same command again")  # fmt: skip
            if _inode(target) != before:
                raise RunFolderError(f"{target}: another process has written it meanwhile; its folder stays, this "
                                     f"one's is discarded")  # fmt: skip
            for file in beside.rglob("*"):
                _sync_file(file)
            if before is None:
                beside.rename(target)
            elif not _exchange(beside, target):
                _replace_in_two_steps(beside, target)
            _sync_folder(target.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            os.close(handle)


def remove_left_overs(folder: Path, names: str) -> None:
    """Remove what killed writers have left in `folder`, and no living process writes: folders that nobody has locked,
    files that nobody has touched for an hour.

    Args:
        names: regular expression of the names they were to get; those of others are left alone.
    """
    pattern = re.compile(rf"\.(?:{names})\.[0-9a-f]{{8}}\.tmp")
    for left_over in [path for path in folder.iterdir() if pattern.fullmatch(path.name)]:
        with contextlib.suppress(OSError):  # somebody writes there, or removes it too, or the system has no such locks
            if not left_over.is_dir():
                if time.time() - left_over.stat().st_mtime > LONGEST_WRITE_S:
                    left_over.unlink()
                continue
            handle = os.open(left_over, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left_over)
            finally:
                os.close(handle)


def _beside(target: Path) -> Path:
    """A new name for what shall take the place of `target`."""
    return named_beside(target, f"{uuid.uuid4().hex[:8]}.tmp")


def _locked_folder(target: Path) -> tuple[Path, int]:
    """A new folder beside `target`, and what holds its lock until it is closed or the process ends."""
    while True:
        beside = _beside(target)
        beside.mkdir()
        handle = os.open(beside, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks: left-overs stay there
            fcntl.flock(handle, fcntl.LOCK_SH)
        if _inode(beside) == os.fstat(handle).st_ino:
            return beside, handle
        os.close(handle)  # taken for a left-over before it was locked


def _exchange(beside: Path, target: Path) -> bool:
    """Let two paths change places at once, so that whoever is killed has one or the other there; False where the system
    or the file system cannot (it is Linux's, and not NFS's)."""
    import ctypes  # no part of `btx --help`

    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return exchange is not None and exchange(here, os.fsencode(beside), here, os.fsencode(target), both) == 0


def _replace_in_two_steps(beside: Path, target: Path) -> None:
    """Let `beside` take the place of the folder `target`, which is back there if that fails."""
    old = _beside(target)
    target.rename(old)
    try:
        beside.rename(target)
    except OSError:
        if not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _inode(path: Path) -> int | None:
    """What tells whether a folder is still the same one; None if there is nothing."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def home_filled(path: str | Path) -> Path:
    """A path with `~` filled in; one of a user that does not exist stays as it is, and will not be found."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (pathlib's raises)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, computed anew only if the file may have changed since it was last asked for.

    Like git's index, it is kept for the file's inode with its size and times: nobody can set the time of a file's last
    change (ctime), so a file that looks the same is the same, wherever its folder was moved to. They lie in the user's
    cache folder, a small file each; where that cannot be written, every process computes its own. A file that is
    younger than `YOUNG_S` might still change within one tick of the clock and is not kept.
    """
    status = path.stat()
    seen, inode = [status.st_size, status.st_mtime_ns, status.st_ctime_ns], f"{status.st_dev}-{status.st_ino}"
    if inode in _hashed and _hashed[inode][0] == seen:
        return _hashed[inode][1]
    kept = _cache_file(inode)
    with contextlib.suppress(RunFolderError, TypeError, KeyError):
        record = read_json(kept) if kept is not None else None
        if record is not None and record["inode"] == inode and record["seen"] == seen:
            _hashed[inode] = (seen, str(record["sha256"]))
            return _hashed[inode][1]
    young = time.time() - status.st_ctime < YOUNG_S
    sha256 = file_sha256(path)
    if not young:
        _hashed[inode] = (seen, sha256)
        if kept is not None:
            with contextlib.suppress(RunFolderError, OSError):
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_sealed(kept, {"inode": inode, "seen": seen, "sha256": sha256})
    return sha256


LONGEST_WRITE_S = 3600.0
"""Seconds that no file of text takes to be written."""
YOUNG_S = 2.0
"""Seconds after its last change for which a file's hash is not kept."""
_hashed: dict[str, tuple[list[int], str]] = {}
"""Device and inode → what the file looked like, and its hash: those that this process has asked for."""


def _cache_file(inode: str) -> Path | None:
    """Where the hash of the file of this inode is kept: in XDG_CACHE_HOME, else in ~/.cache.

    In one of many folders, because `write_text` looks through a file's folder for left-overs.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with contextlib.suppress(RuntimeError):  # nobody's home
        return base.expanduser() / "btx" / "sha256" / inode[-2:] / f"{inode}.json"
    return None


def value_hash(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Tell what fails in writing `target`, and that alone: a block may also read, print and use temporary files.

    Raises:
        RunFolderError: the disk is full or the permissions do not let it be written.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, BtxError | BrokenPipeError) or not _is_about(target, error):
            raise
        if isinstance(error, FileNotFoundError):
            raise RunFolderError(f"{target}: cannot be written: somebody has removed {error.filename or target.parent} "
                                 f"meanwhile. Run the same command again") from error  # fmt: skip
        raise RunFolderError(
            f"{target}: cannot be written ({getattr(error, 'strerror', None) or error}); what was there before is "
            f"untouched. Free space or mend the permissions, then run the same command again"
        ) from error


def _is_about(target: Path, error: Exception) -> bool:
    """Whether an error is about writing `target`: it names it, or says what only writing says."""
    number, name = error_number(error), getattr(error, "filename", None)
    if number in OPEN_FILES:
        return False
    if isinstance(name, str):  # whoever keeps runs in the folder for temporary files means the run
        named, parent = Path(name).absolute(), target.parent.absolute()
        inside = named.relative_to(parent).parts[:1] if named.is_relative_to(parent) else ()
        return parent.is_relative_to(named) or inside == (target.name,) or (
            bool(inside) and inside[0].startswith(f".{target.name}."))  # fmt: skip
    if number in WRITING:
        return not temporary_is_full(error, target)
    return isinstance(error, SafetensorError) and "I/O error" in str(error)


def _sync_file(path: Path) -> None:
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make a rename durable, where the file system has a way to.

    Raises:
        RunFolderError: the disk failed; what was renamed is there, for now.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise RunFolderError(
                f"{path}: what was just written there may not outlast a power failure ({error.strerror or error}). "
                f"Mend the disk, then run the same command again"
            ) from error
    finally:
        os.close(handle)
