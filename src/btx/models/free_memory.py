"""How much host memory there is for a process: what the system and the limits of its container or batch job leave."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil


def free_memory(process: Path = Path("/proc/self"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that the system, and the limits of a container or batch job (Linux's cgroups), leave."""
    free = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError):
        for line in (process / "cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                names = ("memory.max", "memory.current") if not controllers else (
                    "memory.limit_in_bytes", "memory.usage_in_bytes")  # fmt: skip
                group = groups / controllers / path.lstrip("/")
                free += [left for folder in (group, *group.parents) if (left := _left(folder, *names)) is not None]
    return min(free)


def _left(group: Path, limit: str, usage: str) -> int | None:
    """Bytes that a group of processes may still take; None without a limit. Its cached files give way."""
    try:
        most, used = (int((group / name).read_text("utf-8")) for name in (limit, usage))
        counts = dict(line.split(maxsplit=1) for line in (group / "memory.stat").read_text("utf-8").splitlines())
    except (OSError, ValueError):  # no such group here, or the limit is the word max
        return None
    return most - used + int(counts.get("inactive_file", 0))
