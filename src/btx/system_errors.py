"""What went wrong with the machine and not with what it was given: memory, disk, open files, packages. Plain Python.

Whoever turns an error into a message of its own ("this is no model: ...") asks `blame` first, so that a full disk is
never told as a broken file.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import tempfile
from pathlib import Path

from btx.errors import BtxError, DataError, OutOfMemory, RunFolderError, SystemFailed, UserError

PACKAGES = {"datasets": "branchtrainmix[data]", "zstandard": "branchtrainmix[data]", "lm_eval": "branchtrainmix[eval]",
            "peft": "branchtrainmix[lora]", "starlette": "branchtrainmix[serve]", "uvicorn": "branchtrainmix[serve]",
            "sklearn": "scikit-learn", "yaml": "PyYAML"}  # fmt: skip
"""Module → what pip installs for it, where the name is another or an extra has it."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "failed to allocate memory")
"""How the allocators of torch, CUDA and the system say it."""
WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Only writing fails like this."""
OPEN_FILES = {errno.EMFILE, errno.ENFILE}
LITTLE = 1 << 20
"""Bytes of free space with which a disk counts as full."""


def error_number(error: BaseException) -> int | None:
    """The system's number of an error, also where a library written in Rust has put it into the text."""
    if isinstance(error, OSError):
        return error.errno
    matched = re.search(r"\(os error (\d+)\)", str(error))
    return int(matched[1]) if matched else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of a GPU, is used up."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY)
    return said or error_number(error) == errno.ENOMEM


def blame(error: BaseException) -> None:
    """Raise what is right about an error that a caller is about to put down to its input; return if that is fair.

    Raises:
        BtxError: `error` itself, or the machine's failure behind it.
    """
    if isinstance(error, BtxError | BrokenPipeError):
        raise error
    failure = machine_failure(error)
    if failure is not None:
        raise failure from error


def machine_failure(error: BaseException) -> BtxError | None:
    """The message about an error of the machine; None if it may be the input's fault, or is none of these."""
    number = error_number(error)
    if is_out_of_memory(error):
        return OutOfMemory(
            f"out of memory: {first_line(error)}. Give it less at a time: a smaller micro_batch_tokens, fewer "
            f"launch.jobs at once, a smaller model, or a machine or GPU with more memory"
        )
    if isinstance(error, ImportError) and error.name is not None and not error.name.startswith("btx"):
        module = error.name.split(".")[0]
        return UserError(f"the package {module} is missing or broken ({error}): "
                         f"pip install '{PACKAGES.get(module, module)}'")  # fmt: skip
    if number in OPEN_FILES:
        return SystemFailed(f"too many open files{_open_files()}: {first_line(error)}. Raise the limit in the shell "
                            f"that starts btx (ulimit -n 65536), or ask who runs the machine")  # fmt: skip
    if "usable temporary directory" in str(error) or (number in WRITING and temporary_is_full(error)):
        return RunFolderError(f"the folder for temporary files, {_temporary()}, is full or cannot be written "
                              f"({first_line(error)}). Free space there, or set TMPDIR to another folder")  # fmt: skip
    if number in WRITING:
        return RunFolderError(f"{_file(error) or 'a file'}: cannot be written ({first_line(error)}). Free space or "
                              f"mend the permissions, then run the same command again")  # fmt: skip
    return None


def told(error: BaseException) -> BtxError | None:
    """The message about any error that is no fault of the program; None for a fault, whose traceback is needed."""
    if isinstance(error, BtxError):
        return error
    failure = machine_failure(error)
    if failure is None and isinstance(error, OSError) and (file := _file(error)) is not None:
        what = "cannot be read" if os.path.lexists(file) and not os.access(file, os.R_OK) else "cannot be used"
        return DataError(f"{file}: {what} ({error.strerror or error})")
    if failure is None and isinstance(error, OSError):
        return SystemFailed(f"the system refused to read or write: {first_line(error)}")
    return failure


def temporary_is_full(error: BaseException, target: Path | None = None) -> bool:
    """Whether it was the folder for temporary files that something could not be written to, rather than `target`."""
    if (file := _file(error)) is not None:
        return Path(file).absolute().is_relative_to(_temporary())
    return free_bytes(Path(_temporary())) < LITTLE and (target is None or free_bytes(target) >= LITTLE)


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    text = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__
    file = _file(error)
    return (f"{text}, {file}" if file is not None and file not in text else text).rstrip(".")


def _file(error: BaseException) -> str | None:
    """The file an error is about."""
    name = getattr(error, "filename", None)
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else None


def _temporary() -> str:
    """The folder for temporary files, or the first that was to be it."""
    try:
        return tempfile.gettempdir()
    except OSError:
        return os.environ.get("TMPDIR") or "/tmp"


def free_bytes(folder: Path) -> int:
    """Free space where a folder is, or will be."""
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    try:
        return shutil.disk_usage(existing).free
    except OSError:
        return 0


def _open_files() -> str:
    """How many this process may have open."""
    return f" (this process may have {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} open)"
