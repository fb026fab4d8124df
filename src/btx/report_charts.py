"""The report's charts, drawn with matplotlib as small SVG that follows the page's colours and font.

Colours are drawn as placeholders and then replaced by CSS variables, so that one SVG suits light and dark pages.
Text stays text (`svg.fonttype: none`); ids carry a fixed salt per chart and no date, so equal runs give equal files.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = 8
"""Number of series colours the page defines: the CSS variables --c0 to --c7."""

# Size in inches. One column of the page on a desktop, the whole width of a phone: text stays readable in both.
CHART_SIZE = (4.7, 2.9)
FONT_SIZE = 9.0  # points, in the chart's own size
TREND_POINTS = 48
DETAIL_POINTS = 300

# Placeholder → CSS. matplotlib knows no CSS variables, so unlikely greys stand for them while it draws.
_CSS = {"ink": "currentColor", "grid": "var(--rule)", "accent": "var(--accent)", "quiet": "var(--quiet)"}
_CSS |= {f"c{i}": f"var(--c{i})" for i in range(COLOURS)}
_PLACEHOLDER = {name: f"#0{i:x}0d0{i:x}" for i, name in enumerate(_CSS)}


@dataclass(frozen=True)
class Curve:
    """One line: `colour` is a name of the page's palette (c0...c7, ink, accent, quiet)."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class CostPoint:
    """One model in the cost figure: training FLOPs, mean bits per byte, active parameters."""

    label: str
    colour: str
    flops: float
    bits_per_byte: float
    active_params: float


def curves_chart(name: str, curves: Sequence[Curve], x_label: str, y_label: str) -> str:
    """Lines with their trend: every step faintly, bucket means strongly. Returns an `<svg>` element."""
    figure, axes = _figure()
    for curve in curves:
        colour = _PLACEHOLDER[curve.colour]
        axes.plot(*bucket_means(curve.x, curve.y, DETAIL_POINTS), color=colour, linewidth=0.6, alpha=0.35)
        axes.plot(*bucket_means(curve.x, curve.y, TREND_POINTS), color=colour, linewidth=1.6, label=curve.label)
    _clip_to_trend(axes, curves)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if len(curves) > 1:
        axes.legend(frameon=False, handlelength=1.2, labelcolor=_PLACEHOLDER["ink"], loc="best", fontsize=FONT_SIZE)
    return _svg(figure, name)


def cost_chart(points: Sequence[CostPoint]) -> str:
    """Mean bits per byte against training FLOPs, circle area = active parameters (paper, figure 2)."""
    figure, axes = _figure(height=3.6, right=0.93 - 0.0165 * max(len(point.label) for point in points))
    largest = max(point.active_params for point in points) or 1.0
    for point in points:
        axes.scatter([point.flops], [point.bits_per_byte], s=230 * point.active_params / largest,
                     color=_PLACEHOLDER[point.colour], alpha=0.75, linewidths=0)
    axes.margins(x=0.12, y=0.14)
    axes.xaxis.set_major_formatter(lambda flops, _: f"{flops:.2g}".replace("e+", "e"))
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("training FLOPs after the seed model")
    axes.set_ylabel("mean bits per byte (lower is better)")
    _label_column(axes, points)
    return _svg(figure, "cost")


def bucket_means(x: Sequence[float], y: Sequence[float], points: int) -> tuple[list[float], list[float]]:
    """`x` and `y` averaged over equal runs of neighbours, so that at most `points` are left."""
    size = -(-len(x) // points)
    if size <= 1:
        return list(x), list(y)
    starts = range(0, len(x), size)
    return ([sum(x[i:i + size]) / len(x[i:i + size]) for i in starts],
            [sum(y[i:i + size]) / len(y[i:i + size]) for i in starts])


def _clip_to_trend(axes: Axes, curves: Sequence[Curve]) -> None:
    """Let the first steps of a model from scratch leave the picture instead of flattening all the rest."""
    settled = [value for curve in curves for value in sorted(curve.y)[: max(1, int(len(curve.y) * 0.98))]]
    low, high = min(settled), max(settled)
    pad = 0.05 * (high - low) or 0.05
    axes.set_ylim(low - pad, high + pad)


def _label_column(axes: Axes, points: Sequence[CostPoint]) -> None:
    """Name every circle in a column at the right with a thin line to it: names never overlap."""
    low, high = axes.get_ylim()
    ordered = sorted(points, key=lambda point: point.bits_per_byte)
    heights = spread([(point.bits_per_byte - low) / (high - low) for point in ordered], gap=0.075)
    for point, height in zip(ordered, heights, strict=True):
        axes.annotate(point.label, xy=(point.flops, point.bits_per_byte), xytext=(1.03, height),
                      textcoords="axes fraction", va="center", ha="left", fontsize=FONT_SIZE, color=_PLACEHOLDER["ink"],
                      annotation_clip=False, parse_math=False,
                      arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": _PLACEHOLDER["quiet"]})


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending `heights` (shares of the axis) pushed apart to at least `gap`, none above 1."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    ceiling = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _figure(height: float = CHART_SIZE[1], right: float = 0.98) -> tuple[Figure, Axes]:
    """An empty chart without pyplot: nothing global is touched. `right` is where the axes end, as a share."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    ink, grid = _PLACEHOLDER["ink"], _PLACEHOLDER["grid"]
    figure = Figure(figsize=(CHART_SIZE[0], height))
    figure.subplots_adjust(left=0.14, right=right, bottom=0.16 * CHART_SIZE[1] / height, top=0.97)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    figure.patch.set_alpha(0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(grid)
    axes.tick_params(colors=ink, length=0, labelsize=FONT_SIZE)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=ink, fontsize=FONT_SIZE)
    axes.grid(True, axis="y", color=grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=6)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` to put into the page: no XML header, no metadata, no size, page colours."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg[^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r' id="[a-zA-Z0-9.]+_[0-9]+"', "", svg)  # the same in every chart, and nothing refers to them
    svg = re.sub(r"font: (?:[\w ]+ )?([0-9.]+px) [^;\"]+", r"font-size: \1", svg)  # the page's font applies
    svg = re.sub(r"font-family: [^;\"]+;? ?", "", svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"', "", svg)
    for key, placeholder in _PLACEHOLDER.items():
        svg = svg.replace(placeholder, _CSS[key])
    return re.sub(r"\n\s*", "\n", svg).strip()
