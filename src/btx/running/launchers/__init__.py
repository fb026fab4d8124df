"""How jobs are started: one file a launcher, one table that pipeline and sweeps go by (`launch.kind`). What launchers
there are, for a recipe and `btx ls`, is in `btx.choices.launchers`.
"""

from btx.running.launchers.job import Job, Launcher
from btx.running.launchers.local import start_local, start_run

START: dict[str, Launcher] = {"local": Launcher(start_local, start_run)}
"""`launch.kind` → how stages and whole runs are started."""

__all__ = ["START", "Job", "Launcher"]
