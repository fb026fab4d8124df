"""Jobs that give no sign of life: stopped as a whole, or on a machine that is gone. Plain Python.

A job whose work hangs while it runs ends itself (`btx.process.ending_if_hung`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from btx.run_folder import lease


class Silence:
    """How long the process of a job has given no sign of life, by this process's own clock.

    Args:
        run: the run folder.
        stages: those of the job. One that waits, or is between two stages, is not silent.
    """

    def __init__(self, run: Path, stages: Sequence[str]) -> None:
        self._leases = [lease.lock_file(run, stage, "lease") for stage in stages]
        self._seen: list[object] = []
        self._silent_s, self._before = 0.0, time.monotonic()

    def exceeds(self, limit_s: float) -> bool:
        """Whether it has lasted for `limit_s` seconds, and so long that it is no chance. Counted while this is asked: a
        pause of this process itself is none of the job's."""
        signs, now = [lease.sign_of_life(file) for file in self._leases], time.monotonic()
        silent = signs == self._seen and any(sign is not None for sign in signs)
        self._silent_s = (self._silent_s + min(now - self._before, lease.BEAT_S)) * silent
        self._seen, self._before = list(signs), now
        return self._silent_s > max(limit_s, lease.LEASE_S)
