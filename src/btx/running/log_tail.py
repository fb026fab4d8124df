"""Reading a log while another process writes it. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class LogTail:
    """What is written to a log from some place on."""

    path: Path
    offset: int
    """Bytes before it have been read, or were there before."""

    @classmethod
    def from_now(cls, path: Path) -> LogTail:
        """What is written from now on; the log need not be there yet."""
        return cls(path, path.stat().st_size if path.exists() else 0)

    def new_lines(self) -> list[str]:
        """Whole lines the log has got since the last call."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                text = file.read()
        except FileNotFoundError:  # not there yet, or somebody removed it
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        return whole.decode("utf-8", "replace").splitlines()
