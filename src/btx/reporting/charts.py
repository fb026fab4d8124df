"""The report's charts, drawn with matplotlib as small SVG that follows the page's colours and font.

Colours are drawn as placeholders and then replaced by CSS variables, so that one SVG suits light and dark pages.
Text stays text (`svg.fonttype: none`); ids carry a fixed salt per chart and no date, so equal runs give equal files.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = 8
"""Number of series colours the page defines: the CSS variables --c0 to --c7."""

# Size in inches. One column of the page on a desktop, the whole width of a phone: text stays readable in both.
CHART_SIZE = (4.7, 2.9)
WIDE = 9.4  # two columns
LABEL_GAP = 0.2  # inches between two names in a column
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
    error: float = 0.0
    """Standard error of the bits per byte; 0 draws none."""


@dataclass(frozen=True)
class Bars:
    """One model in the bar chart: per column a value and how far its error reaches left and right; None leaves the bar
    out."""

    label: str
    colour: str
    values: Sequence[float | None]
    errors: Sequence[tuple[float, float]]


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


def cost_chart(points: Sequence[CostPoint], *, name: str = "cost", wide: bool = False) -> str:
    """Mean bits per byte against training FLOPs, circle area = active parameters (paper, figure 2)."""
    width = WIDE if wide else CHART_SIZE[0]
    longest = max(len(point.label) for point in points)
    figure, axes = _figure(max(3.6, LABEL_GAP * len(points) + 0.7), 1 - (0.33 + 0.0776 * longest) / width, width)
    largest = max(point.active_params for point in points) or 1.0
    for point in points:
        colour = _PLACEHOLDER[point.colour]
        axes.scatter(
            [point.flops],
            [point.bits_per_byte],
            s=230 * point.active_params / largest,
            color=colour,
            alpha=0.75,
            linewidths=0,
        )
        if point.error:
            axes.errorbar(
                [point.flops],
                [point.bits_per_byte],
                yerr=[point.error],
                color=colour,
                elinewidth=1.0,
                capsize=2.0,
                fmt="none",
            )
    axes.margins(x=0.12, y=0.14)
    axes.xaxis.set_major_formatter(lambda flops, _: f"{flops:.2g}".replace("e+", "e"))
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("training FLOPs after the seed model")
    axes.set_ylabel("mean bits per byte (lower is better)")
    _label_column(axes, points)
    return _svg(figure, name)


def bars_chart(name: str, columns: Sequence[str], bars: Sequence[Bars], unit: str = "%") -> str:
    """Horizontal bars from zero with error bars: a panel per column, a line per model (paper, figure 2)."""
    from matplotlib.figure import Figure

    height = LABEL_GAP * len(bars) + 0.75
    figure = Figure(figsize=(WIDE, height))
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    left = 0.15 + 0.0776 * max(len(bar.label) for bar in bars)
    figure.subplots_adjust(left=left / WIDE, right=0.99, bottom=0.35 / height, top=1 - 0.3 / height, wspace=0.12)
    for number, (axes, column) in enumerate(zip(panels, columns, strict=True)):
        _style(figure, axes, grid="x")
        axes.spines["left"].set_visible(False)
        axes.axvline(0.0, color=_PLACEHOLDER["quiet"], linewidth=0.8)
        axes.set_title(column, fontsize=FONT_SIZE, color=_PLACEHOLDER["ink"], parse_math=False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} {unit}".replace("-", "−"))
        axes.locator_params(axis="x", nbins=3)
        for line, bar in enumerate(bars):
            value = bar.values[number]
            if value is None:
                continue
            axes.barh([line], [value], height=0.7, color=_PLACEHOLDER[bar.colour], alpha=0.8)
            if any(bar.errors[number]):
                axes.errorbar(
                    [value],
                    [line],
                    xerr=[[reach] for reach in bar.errors[number]],
                    color=_PLACEHOLDER["ink"],
                    elinewidth=0.9,
                    capsize=1.8,
                    fmt="none",
                )
    panels[0].set_yticks(range(len(bars)), [bar.label for bar in bars], parse_math=False)
    panels[0].set_ylim(len(bars) - 0.4, -0.6)  # the first model on top
    return _svg(figure, name)


def stacked_svg(charts: Sequence[tuple[str, str]]) -> str:
    """Charts below each other, each under its title, as the text of an .svg file that stands alone."""
    parts, y, width = [], 0.0, 0.0
    for title, svg in charts:
        _, _, chart_width, chart_height = map(float, re.search(r'viewBox="([^"]+)"', svg)[1].split())  # type: ignore[index]
        parts.append(f'<text x="8" y="{y + 20:g}" font-size="13" fill="currentColor">{escape(title)}</text>')
        parts.append(svg.replace("<svg ", f'<svg y="{y + 28:g}" width="{chart_width:g}" height="{chart_height:g}" ', 1))
        y, width = y + 36 + chart_height, max(width, chart_width)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width:g} '
        f'{y:g}" width="{width:g}" height="{y:g}">\n<style>{_page_colours()} svg {{ color: var(--ink); font-family: '
        f'system-ui, sans-serif; }}</style>\n<rect width="100%" height="100%" fill="var(--card)"/>\n'
        + "\n".join(parts) + "\n</svg>\n"
    )  # fmt: skip


def _page_colours() -> str:
    """The page's colours, for light and dark: what its style sheet says before anything else."""
    style = (resources.files("btx.reporting") / "templates" / "report.css").read_text("utf-8")
    return re.sub(r"\s+", " ", style[: style.index("* {")])


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
    inches = axes.get_figure().get_figheight() * axes.get_position().height  # type: ignore[union-attr]
    heights = spread([(point.bits_per_byte - low) / (high - low) for point in ordered], gap=LABEL_GAP / inches)
    for point, height in zip(ordered, heights, strict=True):
        axes.annotate(
            point.label,
            xy=(point.flops, point.bits_per_byte),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            ha="left",
            fontsize=FONT_SIZE,
            color=_PLACEHOLDER["ink"],
            annotation_clip=False,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": _PLACEHOLDER["quiet"]},
        )


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


def _figure(height: float = CHART_SIZE[1], right: float = 0.98, width: float = CHART_SIZE[0]) -> tuple[Figure, Axes]:
    """An empty chart without pyplot: nothing global is touched. `right` is where the axes end, as a share."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(width, height))
    left = 0.14 * CHART_SIZE[0] / width
    figure.subplots_adjust(left=left, right=right, bottom=0.16 * CHART_SIZE[1] / height, top=0.97)
    axes = figure.add_subplot()
    _style(figure, axes, grid="y")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.locator_params(axis="x", nbins=6)
    return figure, axes


def _style(figure: Figure, axes: Axes, grid: Literal["x", "y"]) -> None:
    """The page's look: no box, thin lines across the values' axis, its colours and text size."""
    ink, rule = _PLACEHOLDER["ink"], _PLACEHOLDER["grid"]
    axes.patch.set_alpha(0.0)
    figure.patch.set_alpha(0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(rule)
    axes.tick_params(colors=ink, length=0, labelsize=FONT_SIZE)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=ink, fontsize=FONT_SIZE)
    axes.grid(True, axis=grid, color=rule, linewidth=0.6)
    axes.set_axisbelow(True)


def _svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` to put into the page: no XML header, no metadata, no size, page colours."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg[^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r' id="[a-zA-Z0-9.]+_[0-9]+"', "", svg)  # the same in every chart, and nothing refers to them
    svg = re.sub(r"font: (?:[\w ]+ )?([0-9.]+px) [^;\"]+", r"font-size: \1", svg)  # the page's font applies
    svg = re.sub(r"font-family: [^;\"]+;? ?", "", svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"', "", svg)
    for key, placeholder in _PLACEHOLDER.items():
        svg = svg.replace(placeholder, _CSS[key])
    return re.sub(r"\n\s*", "\n", svg).strip()
