"""How jobs are started: one file a launcher. What launchers there are is in `btx.choices.launchers`.

A launcher starts `btx work RUN STAGE...` somewhere; the run folder's files say how it went.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from btx.running.launchers.local import LocalJob, start_local, start_run

START: dict[str, Callable[[Path, Sequence[str], Path], LocalJob]] = {"local": start_local}
"""Launcher → what starts stages of a run folder, with a file for their output."""

__all__ = ["START", "LocalJob", "start_local", "start_run"]
