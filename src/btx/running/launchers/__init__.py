"""How jobs are started: one file a launcher.

A launcher starts `btx work RUN STAGE...` somewhere; the run folder's files say how it went.
"""

from btx.running.launchers.local import LocalJob, start_local, start_run

LAUNCHERS = {"local": "processes of this machine"}

__all__ = ["LAUNCHERS", "LocalJob", "start_local", "start_run"]
