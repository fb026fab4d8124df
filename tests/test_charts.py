"""The report's charts: what is drawn where, by the numbers of their SVG; colours that every eye can tell apart."""

from __future__ import annotations

import itertools
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from btx.reporting.charts import BarPanels, Bars, CostChart, CostPoint, Curve, HeatMap, Lines, TrainingCurves
from btx.reporting.drawing import COLOURS, FONT_SIZE, Chart, page_colours
from tests.report_data import NAMES

Box = tuple[float, float, float, float]


def labels(svg: str) -> dict[str, Box]:
    """Texts of a chart that lie level → their boxes (left, top, right, bottom) in the chart's points, if letters are
    0.62 of the font size wide."""
    boxes = {}
    texts = re.findall(
        r'<text style="font-size: ([\d.]+)px;([^"]*)"(?: x="(-?[\d.]+)" y="(-?[\d.]+)")?'
        r'(?: transform="translate\((-?[\d.]+) (-?[\d.]+)\)(?: rotate\(-90[^"]*)?")?[^>]*>([^<]+)</text>', svg,
    )  # fmt: skip
    for size, style, x, y, moved_x, moved_y, text in texts:
        left, base, width = float(x or moved_x), float(y or moved_y), 0.62 * float(size) * len(text)
        left -= {"middle": width / 2, "end": width}.get(re.sub(r".*text-anchor: (\w+).*", r"\1", style), 0.0)
        boxes[text] = (left, base - 0.8 * float(size), left + width, base + 0.2 * float(size))
    return boxes


def line_points(svg: str, colour: str) -> list[tuple[float, float]]:
    """Points of all lines of a colour."""
    found = []
    for path, style in re.findall(r'<path d="([^"]+)"[^>]*style="([^"]*)"', svg):
        if f"stroke: {colour}" in style and "fill: none" in style:
            found += [(float(x), float(y)) for x, y in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path)]
    return found


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share more than an edge."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def eight_curves() -> list[Curve]:
    """Eight lines that end close together."""
    names = [*NAMES, "a long generalist's name"]
    return [Curve(name, f"c{i}", range(100), [3 - i / 50 - x / 100 for x in range(100)])
            for i, name in enumerate(names)]  # fmt: skip


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    """Charts with many names."""
    bars = [Bars(f"expert/{name}", f"c{i}", [3.0 - i, 1.0], [(0.5, 0.5), (0.0, 0.0)]) for i, name in enumerate(NAMES)]
    points = [CostPoint(name, f"c{i}", i * 3.4e12, 1.5 - i / 300, 1e6) for i, name in enumerate(NAMES)]
    charts: list[Chart] = [
        TrainingCurves("training", eight_curves(), "loss"),
        Lines("lines", eight_curves(), "layer", "share"),
        CostChart(points),
        BarPanels("bars", ["math", "code"], bars),
    ]
    return {chart.name: chart.svg() for chart in charts}


@pytest.mark.parametrize("name", ["training", "lines", "cost"])
def test_names_stand_beside_the_lines_and_never_over_them_or_each_other(drawn: dict[str, str], name: str) -> None:
    svg = drawn[name]
    boxes = {text: box for text, box in labels(svg).items() if text[:4] in {n[:4] for n in (*NAMES, "a long")}}
    assert len(boxes) == (7 if name == "cost" else 8)
    assert not [pair for pair in itertools.combinations(boxes, 2) if overlap(boxes[pair[0]], boxes[pair[1]])]
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    assert max(box[2] for box in boxes.values()) <= width
    ends = [x for i in range(8) for x, _ in line_points(svg, f"var(--c{i})")]
    assert max(ends) <= min(box[0] for box in boxes.values())  # the thin lines to the names end before them
    assert "legend" not in svg


def test_a_name_that_is_too_long_is_cut(drawn: dict[str, str]) -> None:
    assert "a long generalist's…" in {text.replace("&#39;", "'") for text in labels(drawn["lines"])}


@pytest.mark.parametrize("largest", [1e9, 1.4e13, 2.6e13, 9.9e20])
def test_the_cost_figure_has_three_round_ticks_at_least(largest: float) -> None:
    svg = CostChart(
        [CostPoint("a long model's name", "c0", 0.0, 2.0, 1e6), CostPoint("b", "c1", largest, 1.9, 1e6)]
    ).svg()
    ticks = [text for text in labels(svg) if re.fullmatch(r"[\d.]+e\d+|0", text)]
    assert 3 <= len(ticks) <= 6, ticks


def test_text_is_readable_on_a_phone(drawn: dict[str, str]) -> None:
    """A page of 400 px has 368 for a chart."""
    for name in ("training", "lines", "cost"):
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', drawn[name])[1])  # type: ignore[index]
        assert FONT_SIZE * 368 / width > 9.5


def test_bars_are_a_panel_a_domain_that_a_page_may_put_below_each_other() -> None:
    bars = [Bars("btx", "accent", [10.0, None], [(1.0, 2.0), (0.0, 0.0)])]
    panels = BarPanels("gain", ["math", "code"], bars).panels()
    assert [panel.columns for panel in panels] == [["math"], ["code"]]
    first, second = (panel.svg() for panel in panels)
    (left, right) = (
        float(x)
        for x in re.search(r'M ([\d.]+) [\d.]+ \nL ([\d.]+) [\d.]+ \nL [^"]*"[^>]*fill: var\(--accent', first).groups()
    )  # type: ignore[union-attr]
    error = [x for x, _ in line_points(first, "currentColor")]
    assert (max(error) - min(error)) / (right - left) == pytest.approx(3.0 / 10.0, rel=1e-3)
    assert "var(--accent)" not in second  # nothing was measured there


def test_an_interval_is_a_band_around_its_line() -> None:
    curve = Curve("s", "accent", [0, 1], [0.4, 0.8], [0.3, 0.7], [0.5, 0.9])
    svg = Lines("band", [curve], "layer", "share", from_zero=True).svg()
    (band,) = re.findall(r'<path id="\w+" d="(M [\d.]+ -[^"]+)"', svg)
    assert re.search(r"fill: var\(--accent\); fill-opacity: 0\.2\b", svg)
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ (-[\d.]+)", band)]
    line = [y for _, y in line_points(svg, "var(--accent)")]
    unit = (line[0] - line[1]) / 0.4  # points of height that are 1
    assert max(heights) - min(heights) == pytest.approx(0.6 * unit, rel=1e-3)


def test_a_heat_map_has_a_square_a_pair_of_layers_as_strong_as_its_value() -> None:
    svg = HeatMap("similarity", [[1.0, 0.25], [0.25, 1.0]], "layer").svg()
    squares = re.findall(r"fill: var\(--heat\)(?:; opacity: ([\d.]+)|; fill-opacity: ([\d.]+))?", svg)
    assert sorted(float(a or b or 1) for a, b in squares) == [0.25, 0.25, 1.0, 1.0]
    many = HeatMap("similarity", [[0.5] * 60] * 60, "layer").svg()
    assert many.count("var(--heat)") == 24**2


def test_a_png_has_the_pages_light_ground_and_colours(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "chart.png"
    path.write_bytes(Lines("png", [Curve("a", "c0", [0, 1], [0, 1])], "x", "y").png())
    with Image.open(path) as image:
        assert image.width >= 700
        pixels = {tuple(pixel) for pixel in np.asarray(image.convert("RGB"))[::2].reshape(-1, 3).tolist()}
    colours = page_colours()
    for name in ("card", "c0", "ink"):
        assert tuple(int(colours[name][i : i + 2], 16) for i in (1, 3, 5)) in pixels


# --- colours ----------------------------------------------------------------------------------------------------------

# Machado, Oliveira, Fernandes: A physiologically-based model for simulation of color vision deficiency (2009); no cones
# of a kind at all.
VISION = {
    "all cones": np.eye(3),
    "no long-wave cones": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                                    [-0.003882, -0.048116, 1.051998]]),
    "no middle-wave cones": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                                      [-0.011820, 0.042940, 0.968881]]),
    "no short-wave cones": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                                     [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip
# Ottosson: OKLab (2020). A just noticeable difference is about 0.02.
TO_CONES = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                     [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
TO_LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                   [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip


def rgb(colour: str) -> np.ndarray:
    """#rrggbb as 0 to 1."""
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def linear(rgb_3: np.ndarray) -> np.ndarray:
    """sRGB without its gamma."""
    return np.where(rgb_3 <= 0.04045, rgb_3 / 12.92, ((rgb_3 + 0.055) / 1.055) ** 2.4)


def distances(colours: list[str], seen: np.ndarray) -> np.ndarray:
    """Distances in OKLab of all pairs, as an eye sees them."""
    light_N3 = np.clip(linear(np.array([rgb(colour) for colour in colours])) @ seen.T, 0, 1)
    lab_N3 = np.cbrt(light_N3 @ TO_CONES.T) @ TO_LAB.T
    return np.array([np.linalg.norm(a - b) for a, b in itertools.combinations(lab_N3, 2)])


def contrast(a: np.ndarray, b: np.ndarray) -> float:
    """WCAG 2.2, contrast ratio."""
    first, second = (float(linear(colour) @ [0.2126, 0.7152, 0.0722]) + 0.05 for colour in (a, b))
    return max(first, second) / min(first, second)


@pytest.mark.parametrize("dark", [False, True])
def test_eight_experts_have_colours_that_every_eye_tells_apart(dark: bool) -> None:
    page = page_colours(dark=dark)
    colours = [page[f"c{i}"] for i in range(COLOURS)]
    for eye, seen in VISION.items():
        assert distances(colours, seen).min() > 0.08, eye  # four times what is just noticeable
        assert distances(colours[:5], seen).min() > 0.11, eye


def test_the_page_to_talk_to_a_model_has_the_same_colours() -> None:
    served = (resources.files("btx.serving") / "page" / "page.css").read_text("utf-8")
    for dark in (False, True):
        page = page_colours(dark=dark)
        assert all(f"--c{i}: {page[f'c{i}']};" in served for i in range(COLOURS))


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_from_the_ground_and_text_from_colours(dark: bool) -> None:
    page = {name: rgb(colour) for name, colour in page_colours(dark=dark).items()}
    for ground in ("paper", "card"):
        for name in (*(f"c{i}" for i in range(COLOURS)), "accent", "heat"):
            assert contrast(page[name], page[ground]) >= 3.0, (name, ground)  # WCAG 1.4.11, graphics
        for name in ("ink", "soft"):
            assert contrast(page[name], page[ground]) >= 4.5, (name, ground)  # WCAG 1.4.3, text
    for i in range(COLOURS):  # a token's ground: 42 % of its expert's colour
        assert contrast(page["ink"], 0.42 * page[f"c{i}"] + 0.58 * page["card"]) >= 4.5, i
    assert contrast(page["on-heat"], page["heat"]) >= 4.5


def test_a_long_name_of_a_domain_stays_inside_its_panel() -> None:
    panel = BarPanels("domains", ["d" * 64], [Bars("btx", "accent", [12.0], [(1.0, 1.0)])]).panels()[0].svg()
    left, _, right, _ = next(box for text, box in labels(panel).items() if text.startswith("ddd"))
    assert left >= 0
    assert right <= float(re.search(r'viewBox="0 0 ([\d.]+)', panel)[1])  # type: ignore[index]
