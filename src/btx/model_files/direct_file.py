"""A file written once from start to end, by a thread of its own and past the page cache where the system allows it.

The output of a mix only counts when it is on the disk. Going through the page cache on the way would copy everything
once more, and push the inputs out of memory while they are being read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import queue
import threading
from pathlib import Path
from types import TracebackType

import numpy as np

from btx.process import note_progress

BUFFER_BYTES = 2**23
"""A multiple of every disk's block size."""
_BUFFERS = 3
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only


class DirectFile:
    """Use it as a context; what `write` gets has to stay in order, and is copied.

    Raises:
        OSError: the disk is full, or writing failed in another way.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = _open(path)
        self._free: queue.Queue[mmap.mmap] = queue.Queue()
        for _ in range(_BUFFERS):
            self._free.put(mmap.mmap(-1, BUFFER_BYTES))  # anonymous maps begin at a page's start, as direct writes need
        self._full: queue.Queue[tuple[mmap.mmap, int] | None] = queue.Queue()
        self._buffer = self._free.get()
        self._filled = 0
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name=f"writes {path.name}", daemon=True)

    def __enter__(self) -> DirectFile:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._full.put((self._buffer, self._filled))
        self._full.put(None)
        self._thread.join()
        os.close(self._descriptor)
        if self._error is not None and kind is None:
            raise self._error

    def write(self, data: bytes | memoryview) -> None:
        """Take bytes; waits while the disk is behind. Raises what an earlier write raised."""
        source, at = np.frombuffer(data, dtype=np.uint8), 0
        while at < len(source):
            size = min(len(source) - at, BUFFER_BYTES - self._filled)
            target = np.frombuffer(self._buffer, dtype=np.uint8)
            target[self._filled : self._filled + size] = source[at : at + size]
            self._filled += size
            at += size
            if self._filled == BUFFER_BYTES:
                self._full.put((self._buffer, BUFFER_BYTES))
                self._buffer, self._filled = self._free.get(), 0
                if self._error is not None:
                    raise self._error

    def _run(self) -> None:
        while (item := self._full.get()) is not None:
            buffer, size = item
            if self._error is None:
                try:
                    self._write(memoryview(buffer)[:size])
                    note_progress()
                except OSError as error:
                    self._error = OSError(error.errno, error.strerror, str(self._path))
            self._free.put(buffer)

    def _write(self, data: memoryview) -> None:
        if len(data) < BUFFER_BYTES:  # the file's end is no whole number of disk blocks
            _through_the_cache(self._descriptor)
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not _through_the_cache(self._descriptor):
                    raise


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with contextlib.suppress(OSError):  # not every file system can write directly
        return os.open(path, flags | _DIRECT, 0o666)
    return os.open(path, flags, 0o666)


def _through_the_cache(descriptor: int) -> bool:
    """Write through the page cache from here on; False if it was so already."""
    if not _DIRECT:
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)
