"""What made a run: versions, command, commit, and when. Plain Python."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from btx.files import file_sha256
from btx.model_files.provenance import PACKAGES, package_versions


def now() -> str:
    """The time, in UTC, as the run folder's files have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def manifest(recipe: Path) -> dict[str, Any]:
    """What made this run: versions, command, git commit of the working directory, hash of the recipe."""
    packages = (*PACKAGES, "tokenizers", "numpy")
    return {
        "time": now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "versions": package_versions(packages),
        "git": _git_commit(),
        "recipe_sha256": file_sha256(recipe),
        "timezone": time.tzname[0],
    }


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
