"""How jobs are started: one file a launcher, one table that the pipeline and sweeps go by (`launch.kind`)."""

from btx.running.launchers.job import Job, Launcher
from btx.running.launchers.local import start_local, start_run

LAUNCHERS = {"local": "processes of this machine"}

_LAUNCHERS: dict[str, Launcher] = {"local": Launcher(start_local, start_run)}


def launcher(kind: str) -> Launcher:
    """The launcher that `launch.kind` names."""
    return _LAUNCHERS[kind]


__all__ = ["LAUNCHERS", "Job", "Launcher", "launcher"]
