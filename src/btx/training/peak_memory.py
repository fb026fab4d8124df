"""The most memory a stage has held: of the whole process on a CPU, of torch's allocator on a GPU.

On a CPU that includes the interpreter and its libraries, some hundred megabytes before the first weight.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # man 5 proc: resets VmHWM to the current resident set size


def reset_peak_memory(device: torch.device) -> None:
    """Count from here on, where the system lets a process do so (Linux, CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        CLEAR.write_text(RESET_PEAK)


def peak_memory_bytes(device: torch.device) -> int:
    """Bytes held at most since the last reset; on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in STATUS.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
