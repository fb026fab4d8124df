"""Trackers follow metrics.jsonl: each has a thread of its own that reads what was appended and hands it on.

So training waits for no tracker, and what one has is what the file has: a start after a kill, a tracker that was down
for a while or was named only now get the steps they lack. A tracker that fails is told of once and left alone until the
stage is started the next time.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from btx.errors import UserError
from btx.metrics_file import last_metrics
from btx.number_texts import is_number
from btx.process import Interrupted, Log
from btx.system_errors import first_line
from btx.training.trackers.tracker import Ending, Point, Tracked, Tracker

FOLDER = "trackers"
"""In a stage's folder: what trackers keep of it."""
LOOKS_S = 2.0
"""Seconds between two looks at the file."""
LONGEST = 200
"""Characters told of why a tracker failed."""
BATCH = 500
"""Steps handed on at once."""
PATIENCE_S: dict[Ending, float] = {"finished": 60.0, "interrupted": 5.0, "failed": 5.0}
"""Seconds a stage that ends waits for a tracker: few where a machine may be taken away."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed; plain Python.

    Raises:
        UserError: with the line that installs it.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        extras = ",".join(missing)
        raise UserError(
            f'track: {", ".join(missing)}: not installed: pip install "branchtrainmix[{extras}]"; or leave it out of '
            f"track: metrics.jsonl is written anyway"
        )


@contextlib.contextmanager
def followed(names: Sequence[str], tracked: Tracked, file: Path, experts: Sequence[str], log: Log) -> Iterator[None]:
    """While the block runs, trackers get what is appended to a metrics file, and at its end the rest.

    Args:
        file: metrics.jsonl, which is only appended to from now on.
        experts: names of a MoE model's experts.
        log: told of a tracker that fails.
    """
    followers = [Follower(name, tracked, file, experts, log) for name in names]
    for follower in followers:
        follower.start()
    ending: Ending = "failed"
    try:
        yield
        ending = "finished"
    except Interrupted:
        ending = "interrupted"
        raise
    finally:
        for follower in followers:
            follower.end(ending)
        deadline = time.monotonic() + PATIENCE_S[ending]
        for follower in followers:
            follower.join(max(0.0, deadline - time.monotonic()))
            if follower.is_alive():
                seconds = PATIENCE_S[ending]
                log(f"warning: track: {follower.name} has not taken every step after {seconds:g} s; not waited for")


class Follower(threading.Thread):
    """The thread of one tracker."""

    def __init__(self, name: str, tracked: Tracked, file: Path, experts: Sequence[str], log: Log) -> None:
        super().__init__(name=name, daemon=True)
        self._tracked, self._file, self._experts, self._log = tracked, file, experts, log
        self._ended = threading.Event()
        self._zero = time.time() - (last_metrics(file) or {}).get("wall_s", 0.0)
        self._ending: Ending = "failed"

    def end(self, ending: Ending) -> None:
        """Nothing more is appended: take the rest and close."""
        self._ending = ending
        self._ended.set()

    def run(self) -> None:
        """Until the end, or the first failure."""
        try:
            tracker: Tracker = import_module(f"btx.training.trackers.{self.name}").Run(self._tracked)
            with open(self._file, "rb") as lines:
                last = False
                while not last:
                    last = self._ended.wait(LOOKS_S)
                    self._hand_on(lines, tracker)
            tracker.close(self._ending)
        except Exception as error:
            why = first_line(error)[:LONGEST]
            self._log(
                f"warning: track: {self.name} failed ({type(error).__name__}: {why}); training goes on without it, and "
                f"metrics.jsonl has every step. The next start of this stage tries again"
            )

    def _hand_on(self, lines: BinaryIO, tracker: Tracker) -> None:
        """What is in the file by now and the tracker has not. Times are as if training had not been interrupted."""
        while batch := [json.loads(line) for line in islice(_whole(lines), BATCH)]:
            points = [Point(line["step"], self._zero + line.get("wall_s", 0.0), numbers(line, self._experts))
                      for line in batch if line["step"] > tracker.last_step]  # fmt: skip
            if points:
                tracker.add(points)


def _whole(lines: BinaryIO) -> Iterator[bytes]:
    """Lines from where a file stands, up to one that is still being written."""
    while line := lines.readline():
        if not line.endswith(b"\n"):
            lines.seek(-len(line), 1)
            return
        yield line


def numbers(line: Mapping[str, Any], experts: Sequence[str]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, by name.

    Of the experts' load (L layers, E experts) each expert's mean over the layers, and the smallest and largest of all;
    of dead experts how many there are.
    """
    values: dict[str, float] = {}
    for name, value in line.items():
        if name == "load":
            values |= _loads(value, experts)
        elif isinstance(value, Mapping):
            values |= {f"{name}/{key}": number for key, number in numbers(value, ()).items()}
        elif isinstance(value, list):
            values[name] = float(len(value))
        elif name != "step" and is_number(value):
            values[name] = float(value)
    return values


def _loads(load_LE: Sequence[Sequence[float]], experts: Sequence[str]) -> dict[str, float]:
    columns = list(zip(*load_LE, strict=True))
    names = experts if len(experts) == len(columns) else [str(number) for number in range(len(columns))]
    means = {f"load/{name}": sum(column) / len(column) for name, column in zip(names, columns, strict=True)}
    return means | {"load/smallest": min(map(min, load_LE)), "load/largest": max(map(max, load_LE))}
