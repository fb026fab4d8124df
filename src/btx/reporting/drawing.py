"""How the report draws: a chart is values that draw themselves with matplotlib in colours that they are given.

As SVG for the page, the colours are CSS variables, so that one drawing suits light and dark; text stays text, ids carry
a fixed salt per chart and no date, so equal runs give equal files. As PNG, for places that show no SVG, they are the
page's light ones.
"""

from __future__ import annotations

import io
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = 8
"""Number of series colours the page defines: the CSS variables --c0 to --c7."""

# Inches. One column of the page on a desktop, the whole width of a phone: text stays readable in both.
WIDTH, HEIGHT = 4.7, 2.9
LABEL_GAP = 0.19  # between two names in a column
FONT_SIZE = 9.0  # points, in the chart's own size
LETTER = 0.0776  # inches a letter takes, at most
LONGEST_LABEL = 20  # letters
PNG_DPI = 160

Colour = Callable[[str], str]
"""Name of one of the page's colours (c0...c7, ink, grid, accent, quiet, heat, on-heat) → the colour for matplotlib."""

_CSS = {"ink": "currentColor", "grid": "var(--rule)", "accent": "var(--accent)", "quiet": "var(--quiet)",
        "heat": "var(--heat)", "on-heat": "var(--on-heat)"}  # fmt: skip
_CSS |= {f"c{i}": f"var(--c{i})" for i in range(COLOURS)}
# matplotlib knows no CSS variables, so unlikely greys stand for them while it draws.
_PLACEHOLDER = {name: f"#0{i:x}0d0{i:x}" for i, name in enumerate(_CSS)}


class Chart(ABC):
    """A chart: its values, and how they are drawn."""

    name: str

    @abstractmethod
    def draw(self, colour: Colour) -> Figure:
        """The figure, in these colours."""

    def panels(self) -> Sequence[Chart]:
        """Charts that say the same, for a page to put beside or below each other: this one, or its parts."""
        return [self]

    def svg(self) -> str:
        """An `<svg>` element to put into the page: no size, no metadata, the page's colours and font."""
        import matplotlib

        buffer = io.StringIO()
        with _any_script(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.draw(_PLACEHOLDER.__getitem__).savefig(buffer, format="svg", metadata={"Date": None})
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

    def png(self) -> bytes:
        """The chart as a PNG image on the page's light ground."""
        buffer = io.BytesIO()
        colours = page_colours()
        figure = self.draw(lambda name: colours[{"grid": "rule"}.get(name, name)])
        with _any_script():
            figure.savefig(buffer, format="png", dpi=PNG_DPI, facecolor=colours["card"], metadata={"Software": None})
        return buffer.getvalue()


@contextmanager
def _any_script() -> Iterator[None]:
    """Names in scripts that matplotlib's own font lacks are nothing to warn of: in SVG the page's font shows them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield


def empty(height: float = HEIGHT, right: float = 0.1, *, colour: Colour) -> tuple[Figure, Axes]:
    """A figure with one empty chart, without pyplot: nothing global is touched.

    Args:
        right: inches that are kept free beside the axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    figure.subplots_adjust(left=0.66 / WIDTH, right=1 - right / WIDTH, bottom=0.48 / height, top=1 - 0.1 / height)
    axes = figure.add_subplot()
    style(figure, axes, "y", colour)
    return figure, axes


def style(figure: Figure, axes: Axes, grid: Literal["x", "y"], colour: Colour) -> None:
    """The page's look: no box, thin lines across the values' axis, its colours and text size."""
    ink, rule = colour("ink"), colour("grid")
    axes.patch.set_alpha(0.0)
    figure.patch.set_alpha(0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(rule)
    axes.tick_params(colors=ink, length=0, labelsize=FONT_SIZE)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=ink, fontsize=FONT_SIZE)
    axes.grid(True, axis=grid, color=rule, linewidth=0.6)
    axes.set_axisbelow(True)


def ticks(
    axes: Axes,
    axis: Literal["x", "y"],
    at_most: int,
    text: Callable[[float], str] | None = None,
    *,
    whole: bool = False,
) -> None:
    """At least three and at most about `at_most` round values along an axis, written by `text`; with `whole`, whole
    numbers alone, however few."""
    from matplotlib.ticker import MaxNLocator

    one = axes.xaxis if axis == "x" else axes.yaxis
    one.set_major_locator(
        MaxNLocator(
            at_most, min_n_ticks=1 if whole else 3, integer=whole, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10]
        )
    )
    if text is not None:
        one.set_major_formatter(lambda value, _: text(value))


def column_width(labels: Sequence[str]) -> float:
    """Inches that `label_column` needs beside the axes."""
    return 0.3 + LETTER * max(len(shortened(label)) for label in labels)


def column_height(count: int) -> float:
    """Inches of a chart in which a column has room for `count` names."""
    return max(HEIGHT, LABEL_GAP * count + 0.7)


def label_column(axes: Axes, points: Sequence[tuple[str, str, float, float]], colour: Colour) -> None:
    """Name each of `points` (label, colour, x, y) in a column beside the axes, a thin line between: names overlap
    neither each other nor what is drawn."""
    low, high = axes.get_ylim()
    ordered = sorted(points, key=lambda point: point[3])
    inches = axes.get_figure().get_figheight() * axes.get_position().height  # type: ignore[union-attr]
    heights = spread([(y - low) / (high - low) for *_, y in ordered], gap=LABEL_GAP / inches)
    for (label, shade, x, y), height in zip(ordered, heights, strict=True):
        axes.annotate(
            shortened(label), xy=(x, min(max(y, low), high)), xytext=(1.05, height), textcoords="axes fraction",
            va="center", ha="left", fontsize=FONT_SIZE, color=colour("ink"), annotation_clip=False, parse_math=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.8, "color": colour(shade), "shrinkB": 0,
                        "relpos": (0.0, 0.5)},
        )  # fmt: skip


def shortened(label: str, longest: int = LONGEST_LABEL) -> str:
    """A name as a chart has room for it: `longest` characters."""
    return label if len(label) <= longest else label[: longest - 1] + "…"


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


def stacked_svg(charts: Sequence[tuple[str, str]]) -> str:
    """Charts' SVG below each other, each under its title, as the text of an .svg file that stands alone."""
    parts, y, width = [], 0.0, 0.0
    for title, svg in charts:
        _, _, chart_width, chart_height = map(float, re.search(r'viewBox="([^"]+)"', svg)[1].split())  # type: ignore[index]
        parts.append(f'<text x="8" y="{y + 20:g}" font-size="13" fill="currentColor">{escape(title)}</text>')
        parts.append(svg.replace("<svg ", f'<svg y="{y + 28:g}" width="{chart_width:g}" height="{chart_height:g}" ', 1))
        y, width = y + 36 + chart_height, max(width, chart_width, 30 + 6.5 * len(title))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width:g} '
        f'{y:g}" width="{width:g}" height="{y:g}">\n<style>{colour_rules()} svg {{ color: var(--ink); font-family: '
        f'system-ui, sans-serif; }}</style>\n<rect width="100%" height="100%" fill="var(--card)"/>\n'
        + "\n".join(parts) + "\n</svg>\n"
    )  # fmt: skip


@cache
def page_colours(*, dark: bool = False) -> dict[str, str]:
    """Name → colour of the page, light or dark: `#rrggbb`."""
    light, _, of_dark = colour_rules().partition("@media")
    colours = re.findall(r"--(\w[\w-]*): (#[0-9a-f]+)", of_dark if dark else light)
    return {name: value if len(value) == 7 else "#" + "".join(2 * digit for digit in value[1:])
            for name, value in colours}  # fmt: skip


def colour_rules() -> str:
    """What the page's style sheet says before anything else: its colours, for light and dark."""
    style = (resources.files("btx.reporting") / "templates" / "report.css").read_text("utf-8")
    return re.sub(r"\s+", " ", style[: style.index("* {")])
