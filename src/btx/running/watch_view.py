"""A look at a run as text: what fits a terminal of any size, and a line a change for where there is none. Plain
Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from btx.number_texts import clock_text
from btx.running.looks import Look, Row

BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
STYLES = {"done": "green", "running": "bold cyan", "queued": "yellow", "failed": "bold red", "damaged": "bold red",
          "stale": "yellow", "begun": "yellow", "absent": "dim"}  # fmt: skip
WIDE, MIDDLE, NARROW = 96, 64, 40
"""Columns from which on there is room for everything, for a curve, for step and loss."""


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """Means of equal parts of `values` as one row of at most `width` signs, the lowest and highest at its bounds."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    bounds = [len(values) * place // count for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, span = min(means), max(means) - min(means)
    return "".join(blocks[round((mean - low) / span * (len(blocks) - 1)) if span else 0] for mean in means)


def printable(text: str) -> str:
    """Text from files without what would steer a terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


@dataclass(frozen=True)
class View:
    """A look, drawn for the size that the console has when it is drawn."""

    look: Look
    remarks: Sequence[str] = ()
    """More of them, for this time."""
    whole: bool = False
    """Whether it may be higher than the terminal."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Title, rows, details, remarks; what is finished and what is still to come is folded where it does not fit."""
        width, height = options.max_width, options.height or console.height
        blocks = PLAIN_BLOCKS if options.ascii_only else BLOCKS
        details = [line for row in self.look.rows for line in _details(row, blocks)]
        details += [Text(printable(remark), "yellow") for remark in (*self.look.remarks, *self.remarks)]
        rows, folded = list(self.look.rows), ""
        if not self.whole:
            details = details[: max(1, (height - 3) // 3)] if len(rows) + len(details) > height - 3 else details
            rows, folded = fold(rows, height - 3 - len(details))
        lines: list[Text | Table] = [Text(printable(self.look.title), "bold"), _table(rows, width, blocks)]
        lines += [*([Text(folded, "dim")] if folded else []), *details]
        for line in lines:
            if isinstance(line, Text) and not self.whole:
                line.no_wrap, line.overflow = True, "ellipsis"
        yield Group(*lines)


def _details(row: Row, blocks: str) -> Iterator[Text]:
    """Expert load, spikes, and why something does not go on: a line each."""
    name = printable(row.name)
    if row.load:
        bars = sparkline([0.0, *row.load.values(), 1.0], len(row.load) + 2, blocks)[1:-1]
        dead = f"  {row.dead} dead" if row.dead else ""
        yield Text(f"{name} load {bars}  {printable(load_text(row))}{dead}", "red" if row.dead else "")
    if row.spikes and row.state != "done":
        yield Text(f"{name}: {spikes_text(row)} in loss or gradient", "yellow")
    if row.note and row.state in ("failed", "stale", "queued", "damaged"):
        yield Text(f"{name} {row.state}: {printable(row.note)}", STYLES[row.state])


def fold(rows: Sequence[Row], room: int) -> tuple[list[Row], str]:
    """The rows that are shown in `room` lines, and what is said of the others in one of them: first what is finished is
    left out, then what is still to come."""
    kept, left_out = list(rows), list[str]()
    for states, what in ((("done",), "done"), (("absent", "stale"), "to come"), (("queued",), "queued")):
        count = sum(row.state in states for row in kept)
        if len(kept) + bool(left_out) > room and count:
            kept = [row for row in kept if row.state not in states]
            left_out.append(f"{count} {what}")
    if len(kept) + bool(left_out) > room:
        most = max(0, room - 1)
        left_out.append(f"{len(kept) - most} more")
        kept = kept[:most]
    return kept, ", ".join(left_out)


def _table(rows: Sequence[Row], width: int, blocks: str) -> Table:
    columns = ["job", "state", *(["step", "loss"] if width >= NARROW else []),
               *(["curve", "tokens/s"] if width >= MIDDLE else []), "ETA"]  # fmt: skip
    curve = min(32, width - WIDE + 8) if width >= WIDE else 8
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for column in columns:
        left = column in ("job", "state", "curve")
        table.add_column(column, justify="left" if left else "right", no_wrap=True, overflow="ellipsis",
                         header_style="dim")  # fmt: skip
    for row in rows:
        runs = row.state == "running"
        where = f" {printable(row.note)}" if width >= WIDE and runs else ""
        cells = {
            "job": Text(printable(row.name)),
            "state": Text(row.state + where, STYLES.get(row.state, "")),
            "step": Text(step_text(row)),
            "loss": Text(f"{row.loss:.3f}" if row.loss is not None else "", "bold" if runs else ""),
            "curve": Text(sparkline(row.losses, curve, blocks), "cyan" if runs else "dim"),
            "tokens/s": Text(f"{row.tokens_per_s:,.0f}" if row.tokens_per_s else ""),
            "ETA": Text(clock_text(row.eta_s) if row.eta_s is not None else ""),
        }
        table.add_row(*(cells[column] for column in columns))
    return table


def line_of(row: Row) -> str:
    """A row as one plain line."""
    note = f" {row.note}" if row.note and row.state == "running" else f" ({row.note})" if row.note else ""
    facts = [
        row.state + note,
        f"step {step_text(row)}" if row.step is not None else "",
        f"loss {row.loss:.3f}" if row.loss is not None else "",
        f"{row.tokens_per_s:,.0f} tokens/s" if row.tokens_per_s else "",
        f"ETA {clock_text(row.eta_s)}" if row.eta_s is not None else "",
        f"load {load_text(row)}" if row.load else "",
        f"{row.dead} dead" if row.dead else "",
        spikes_text(row) if row.spikes else "",
    ]
    return f"{row.name}: {', '.join(fact for fact in facts if fact)}"


def step_text(row: Row) -> str:
    """`12/100`."""
    return f"{row.step}/{row.steps}" if row.step is not None else ""


def load_text(row: Row) -> str:
    """`math 60 %  code 40 %`."""
    return "  ".join(f"{name} {100 * share:.0f} %" for name, share in row.load.items())


def spikes_text(row: Row) -> str:
    """`2 spikes (1 left out)`."""
    return f"{row.spikes} spike{'s' * (row.spikes != 1)}" + (f" ({row.skipped} left out)" if row.skipped else "")
