"""Where `btx watch` shows what it sees: a terminal that is drawn anew, or plain lines, one a change. Plain Python."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from datetime import datetime

from rich.console import Console
from rich.live import Live
from rich.text import Text

from btx.running.looks import Look, Row
from btx.running.watch_view import View, line_of, printable

RESIZE_S = 0.1
"""Seconds in which a terminal follows a change of its size."""
SCREEN_EVERY_S, LINES_EVERY_S = 1.0, 10.0
"""Seconds between two looks, unless the user says otherwise."""


class TerminalScreen:
    """The terminal's other screen, which follows its size; in the end the last look stays on the usual one."""

    def __init__(self, console: Console, every_s: float | None = None) -> None:
        self.every_s = every_s or SCREEN_EVERY_S
        self._console = console
        self._live = Live(console=console, screen=True, auto_refresh=False)
        self._last: View | None = None
        self._said: list[str] = []

    def __enter__(self) -> TerminalScreen:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()
        if self._last is not None:
            self._console.print(replace(self._last, whole=True))
        for line in self._said:
            self._console.print(Text(line))

    def say(self, line: str) -> None:
        """Say something: here and when the terminal is the usual one again."""
        self._said.append(printable(line))
        if self._last is None:
            self._live.update(Text(self._said[-1]), refresh=True)

    def show(self, look: Look, remarks: list[str]) -> None:
        if self._last is None:
            self._said.clear()  # what was said while nothing was there
        self._last = View(look, tuple(remarks))
        self._live.update(self._last, refresh=True)

    def wait(self, at_most_s: float | None) -> None:
        """Wait, and draw anew as soon as the terminal has another size."""
        until, size = time.monotonic() + min(self.every_s, at_most_s or self.every_s), self._console.size
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(RESIZE_S, left))
            if self._console.size != size:
                size = self._console.size
                self._live.refresh()


class LineScreen:
    """A line for every row that has changed since the look before.

    Args:
        as_json: lines are JSON objects, and nothing else is said.
    """

    def __init__(self, every_s: float | None = None, *, as_json: bool = False) -> None:
        self.every_s = every_s or LINES_EVERY_S
        self._as_json = as_json
        self._rows: dict[str, tuple[object, ...]] = {}
        self._remarks: list[str] = []

    def __enter__(self) -> LineScreen:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def say(self, line: str) -> None:
        if not self._as_json:
            print(f"{datetime.now():%H:%M:%S} {printable(line)}", flush=True)

    def show(self, look: Look, remarks: list[str]) -> None:
        if not self._rows:
            self.say(look.title)
        for remark in (*look.remarks, *remarks):
            if remark not in self._remarks:
                self.say(f"warning: {remark}")
        self._remarks = [*look.remarks, *remarks]
        for row in look.rows:
            now = (row.state, row.note, row.step, row.spikes, row.dead)
            if self._rows.get(row.name, ("absent", "", None, 0, 0)) != now:
                print(_json_of(row), flush=True) if self._as_json else self.say(line_of(row))
            self._rows[row.name] = now

    def wait(self, at_most_s: float | None) -> None:
        time.sleep(min(self.every_s, at_most_s or self.every_s))


Screen = TerminalScreen | LineScreen
"""Where looks are shown: each is a context manager that can `say` what is no look, `show` a look with what could not be
found out this time, and `wait` for the next."""


def _json_of(row: Row) -> str:
    facts = asdict(replace(row, losses=()))
    del facts["losses"]
    return json.dumps({"time": datetime.now().astimezone().isoformat(timespec="seconds"), **facts})
