"""trackio: a project in RUN/trackio, unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names a place. It sends
nothing anywhere of itself. Checked with trackio 0.43, locally.

`TRACKIO_DIR=RUN/trackio trackio show --project NAME` shows it. A step that is done again after a kill stays what it
was: the project is only added to.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence

from btx.training.trackers.tracker import Ending, Point, Tracked, Tracker


class Run(Tracker):
    """The stage's run, resumed by its name, which no other has."""

    def __init__(self, tracked: Tracked) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(tracked.run.absolute() / "trackio"))  # read when it is imported
        import trackio

        name = tracked.kept("trackio", "name", lambda: f"{tracked.name} {secrets.token_hex(2)}")
        self._run = trackio.init(
            project=tracked.project, group=tracked.group, name=name,
            config=dict(tracked.config), resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        # There is no public way to ask for it that also answers for a project on a server.
        self.last_step = max(getattr(self._run, "_next_step", 0) - 1, 0)

    def add(self, points: Sequence[Point]) -> None:
        """Hand them to trackio's thread, which writes twice a second."""
        for point in points:
            self._run.log(dict(point.values), step=point.step)

    def close(self, ending: Ending) -> None:
        self._run.finish()
