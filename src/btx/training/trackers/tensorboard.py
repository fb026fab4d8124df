"""TensorBoard: an event file in the stage's folder. It sends nothing anywhere. Checked with tensorboard 2.21."""

from __future__ import annotations

import json
from collections.abc import Sequence

from btx.training.trackers.tracker import Ending, Point, Tracked, Tracker


class Run(Tracker):
    """A new event file with all steps in the place of the one before: so no step stands in two files, whatever a
    killed process has left."""

    last_step = 0

    def __init__(self, tracked: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        before = sorted(tracked.folder.glob("events.out.tfevents.*"))
        # purge_step tells a TensorBoard that has read the file before to forget its steps
        self._writer = SummaryWriter(str(tracked.folder), purge_step=0 if before else None, max_queue=1000)
        for file in before:
            file.unlink(missing_ok=True)
        self._writer.add_text("settings", f"```json\n{json.dumps(tracked.config, indent=1)}\n```", 0)

    def add(self, points: Sequence[Point]) -> None:
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.step, walltime=point.time)
        self._writer.flush()

    def close(self, ending: Ending) -> None:
        self._writer.close()
