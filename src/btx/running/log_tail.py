"""Reading a log while another process writes it. Plain Python."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path


@dataclass
class LogTail:
    """What is written to a log from some place on."""

    path: Path
    offset: int
    """Bytes before it have been read, or were there before."""
    inode: int = 0
    """Of the file they were read from; 0: of whichever is there first."""

    @classmethod
    def from_now(cls, path: Path) -> LogTail:
        """What is written from now on; the log need not be there yet."""
        try:
            there = path.stat()
        except FileNotFoundError:
            return cls(path, 0)
        return cls(path, there.st_size, there.st_ino)

    def new_lines(self) -> list[str]:
        """Whole lines the log has got since the last call; all of one that was cut or replaced meanwhile."""
        try:
            with open(self.path, "rb") as file:
                there = os.fstat(file.fileno())
                if there.st_size < self.offset or self.inode not in (0, there.st_ino):
                    self.offset = 0
                self.inode = there.st_ino
                file.seek(self.offset)
                text = file.read()
        except FileNotFoundError:  # not there yet, or somebody removed it
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        return whole.decode("utf-8", "replace").splitlines()


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log, the one that is being written too; none if it is not there."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            return [line.rstrip("\r\n") for line in deque(file, count)]
    except FileNotFoundError:
        return []
