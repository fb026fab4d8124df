"""The report's charts. Each is a chart of values; `drawing` makes SVG and PNG of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from btx.number_texts import count_text, evenly, flops_text
from btx.reporting.drawing import (
    FONT_SIZE,
    LABEL_GAP,
    LETTER,
    LONGEST_LABEL,
    WIDTH,
    Chart,
    Colour,
    column_height,
    column_width,
    empty,
    label_column,
    shortened,
    style,
    ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TREND_POINTS = 48
DETAIL_POINTS = 300
LONGEST_SIDE = 24
"""Rows and columns of a heat map that are drawn, at most."""


@dataclass(frozen=True)
class Curve:
    """One line: `colour` is a name of the page's palette (c0...c7, ink, accent, quiet)."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    """Lower ends of an interval around `y`; none where it is empty."""
    high: Sequence[float] = ()


@dataclass(frozen=True)
class TrainingCurves(Chart):
    """Lines over training tokens with their trend: every step faintly, bucket means strongly."""

    name: str
    curves: Sequence[Curve]
    y_label: str

    def draw(self, colour: Colour) -> Figure:
        figure, axes = _axes_for(self.curves, colour)
        trends = []
        for curve in self.curves:
            shade = colour(curve.colour)
            axes.plot(*bucket_means(curve.x, curve.y, DETAIL_POINTS), color=shade, linewidth=0.6, alpha=0.35)
            x, y = bucket_means(curve.x, curve.y, TREND_POINTS)
            axes.plot(x, y, color=shade, linewidth=1.6)
            trends.append((curve.label, curve.colour, x[-1], y[-1]))
        _clip_to_trend(axes, self.curves)
        ticks(axes, "x", 5, count_text)
        ticks(axes, "y", 6)
        axes.set_xlabel("training tokens")
        axes.set_ylabel(self.y_label)
        if len(self.curves) > 1:
            label_column(axes, trends, colour)
        return figure


@dataclass(frozen=True)
class Lines(Chart):
    """Lines over something that is counted, with bands where they have intervals."""

    name: str
    curves: Sequence[Curve]
    x_label: str
    y_label: str
    mark: float | None = None
    """Where a thin upright line stands."""
    level: float | None = None
    """Where a dashed level line lies."""
    from_zero: bool = False

    def draw(self, colour: Colour) -> Figure:
        figure, axes = _axes_for(self.curves, colour)
        for curve in self.curves:
            shade = colour(curve.colour)
            if curve.low:
                axes.fill_between(curve.x, curve.low, curve.high, color=shade, alpha=0.2, linewidth=0)
            few = len(curve.x) <= 2 * LONGEST_SIDE
            axes.plot(curve.x, curve.y, color=shade, linewidth=1.6, marker="o" if few else "", markersize=3.5)
        if self.mark is not None:
            axes.axvline(self.mark, color=colour("quiet"), linewidth=0.8)
        if self.level is not None:
            axes.axhline(self.level, color=colour("quiet"), linewidth=0.8, linestyle=(0, (3, 3)))
        if self.from_zero:
            axes.set_ylim(bottom=0.0)
        ticks(axes, "x", 6, lambda x: f"{x:g}".replace("-", "−"), whole=True)
        ticks(axes, "y", 6)
        axes.set_xlabel(self.x_label)
        axes.set_ylabel(self.y_label)
        if len(self.curves) > 1:
            label_column(axes, [(curve.label, curve.colour, curve.x[-1], curve.y[-1]) for curve in self.curves], colour)
        return figure


@dataclass(frozen=True)
class CostPoint:
    """One model in the cost figure: training FLOPs, mean bits per byte, active parameters."""

    label: str
    colour: str
    flops: float
    bits_per_byte: float
    active_params: float
    error: float = 0.0
    """Standard error of the bits per byte; 0 draws none."""


@dataclass(frozen=True)
class CostChart(Chart):
    """Mean bits per byte against training FLOPs, circle area = active parameters (paper, figure 2)."""

    points: Sequence[CostPoint]
    name: str = "cost"

    def draw(self, colour: Colour) -> Figure:
        labels = [point.label for point in self.points]
        figure, axes = empty(max(3.6, column_height(len(labels))), column_width(labels), colour=colour)
        largest = max(point.active_params for point in self.points) or 1.0
        for point in self.points:
            at, shade = ([point.flops], [point.bits_per_byte]), colour(point.colour)
            axes.scatter(*at, s=230 * point.active_params / largest, color=shade, alpha=0.75, linewidths=0)
            if point.error:
                axes.errorbar(*at, yerr=[point.error], color=shade, elinewidth=1.0, capsize=2.0, fmt="none")
        axes.margins(x=0.12, y=0.14)
        ticks(axes, "x", 4, lambda value: flops_text(value).replace(".00e", "e").replace("0e", "e"))
        ticks(axes, "y", 6)
        axes.set_xlabel("training FLOPs after the seed model")
        axes.set_ylabel("mean bits per byte (lower is better)")
        label_column(axes, [(point.label, point.colour, point.flops, point.bits_per_byte) for point in self.points],
                     colour)  # fmt: skip
        return figure


@dataclass(frozen=True)
class Bars:
    """One model in the bar chart: per column a value and how far its error reaches left and right; None leaves the bar
    out."""

    label: str
    colour: str
    values: Sequence[float | None]
    errors: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class BarPanels(Chart):
    """Horizontal bars from zero with error bars: a panel per column, a line per model (paper, figure 2)."""

    name: str
    columns: Sequence[str]
    bars: Sequence[Bars]
    unit: str = "%"

    def panels(self) -> list[BarPanels]:
        """Every column as a chart of its own."""
        return [
            BarPanels(f"{self.name}-{number}", [column],
                      [Bars(bar.label, bar.colour, [bar.values[number]], [bar.errors[number]]) for bar in self.bars],
                      self.unit)
            for number, column in enumerate(self.columns)
        ]  # fmt: skip

    def draw(self, colour: Colour) -> Figure:
        """The figure, in these colours: two panels side by side at most."""
        from matplotlib.figure import Figure

        across = min(2, len(self.columns))
        down = -(-len(self.columns) // across)
        each = LABEL_GAP * len(self.bars) + 0.75
        width, height = WIDTH * (1 if across == 1 else 1.75), each * down
        figure = Figure(figsize=(width, height))
        panels = figure.subplots(down, across, sharey=True, squeeze=False).flat
        left = 0.15 + LETTER * max(len(shortened(bar.label)) for bar in self.bars)
        figure.subplots_adjust(left=left / width, right=1 - 0.15 / width, bottom=0.35 / height, top=1 - 0.3 / height,
                               wspace=0.12, hspace=0.65 / (each - 0.65))  # fmt: skip
        for number, (axes, column) in enumerate(zip(panels, self.columns, strict=False)):
            style(figure, axes, "x", colour)
            axes.set_title(
                shortened(column, 2 * LONGEST_LABEL), fontsize=FONT_SIZE, color=colour("ink"), parse_math=False
            )
            self._fill(axes, number, colour)
        for axes in list(panels)[len(self.columns) :]:
            axes.remove()
        return figure

    def _fill(self, axes: Axes, number: int, colour: Colour) -> None:
        """Put the bars of one column in."""
        axes.spines["left"].set_visible(False)
        axes.axvline(0.0, color=colour("quiet"), linewidth=0.8)
        ticks(axes, "x", 4, lambda value: f"{value:g} {self.unit}".replace("-", "−"))
        for line, bar in enumerate(self.bars):
            value = bar.values[number]
            if value is None:
                continue
            axes.barh([line], [value], height=0.7, color=colour(bar.colour), alpha=0.8)
            if any(bar.errors[number]):
                axes.errorbar([value], [line], xerr=[[reach] for reach in bar.errors[number]], color=colour("ink"),
                              elinewidth=0.9, capsize=1.8, fmt="none")  # fmt: skip
        axes.set_yticks(range(len(self.bars)), [shortened(bar.label) for bar in self.bars], parse_math=False)
        axes.set_ylim(len(self.bars) - 0.4, -0.6)  # the first model on top


@dataclass(frozen=True)
class HeatMap(Chart):
    """A square of shares, 0 to 1, the stronger the larger: of many rows and columns some, evenly chosen."""

    name: str
    values: Sequence[Sequence[float]]
    label: str

    def draw(self, colour: Colour) -> Figure:
        from matplotlib.patches import Rectangle

        shown = evenly(len(self.values), LONGEST_SIDE)
        figure, axes = empty(3.6, 1.2, colour=colour)
        axes.grid(visible=False)
        for x, column in enumerate(shown):
            for y, row in enumerate(shown):
                value = min(max(self.values[row][column], 0.0), 1.0)
                axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, facecolor=colour("heat"), alpha=value,
                                         linewidth=0))  # fmt: skip
                if len(shown) <= 8:
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=FONT_SIZE,
                              color=colour("on-heat" if value > 0.6 else "ink"))  # fmt: skip
        some = range(0, len(shown), -(-len(shown) // 12))
        for one in (axes.xaxis, axes.yaxis):
            one.set_ticks(list(some), [str(shown[i]) for i in some])
        axes.set(xlim=(-0.5, len(shown) - 0.5), ylim=(len(shown) - 0.5, -0.5), aspect="equal")
        axes.set_xlabel(self.label)
        axes.set_ylabel(self.label)
        return figure


def bucket_means(x: Sequence[float], y: Sequence[float], points: int) -> tuple[list[float], list[float]]:
    """`x` and `y` averaged over equal runs of neighbours, so that at most `points` are left."""
    size = -(-len(x) // points)
    if size <= 1:
        return list(x), list(y)
    starts = range(0, len(x), size)
    return (
        [sum(x[i : i + size]) / len(x[i : i + size]) for i in starts],
        [sum(y[i : i + size]) / len(y[i : i + size]) for i in starts],
    )


def _axes_for(curves: Sequence[Curve], colour: Colour) -> tuple[Figure, Axes]:
    """An empty chart with room for the names of several curves."""
    if len(curves) < 2:
        return empty(colour=colour)
    return empty(column_height(len(curves)), column_width([curve.label for curve in curves]), colour=colour)


def _clip_to_trend(axes: Axes, curves: Sequence[Curve]) -> None:
    """Let the first steps of a model from scratch leave the picture instead of flattening all the rest."""
    settled = [value for curve in curves for value in sorted(curve.y)[: max(1, int(len(curve.y) * 0.98))]]
    low, high = min(settled), max(settled)
    pad = 0.05 * (high - low) or 0.05
    axes.set_ylim(low - pad, high + pad)
