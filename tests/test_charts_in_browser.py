"""The report's charts and tables in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from btx.reporting.report import write_report
from tests.report_data import analysed_model, full_run

pytestmark = pytest.mark.browser

# Of all texts of a chart, those that another text or a line of the trend covers.
COVERED = """
() => [...document.querySelectorAll("figure svg")].flatMap((svg) => {
  const texts = [...svg.querySelectorAll("text")].filter((text) => text.textContent.trim());
  const boxes = texts.map((text) => text.getBoundingClientRect());
  const over = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
  return texts.filter((_, i) => boxes.some((box, j) => j !== i && over(boxes[i], box))).map((text) => text.textContent);
})
"""
SIDEWAYS = """
() => [...document.querySelectorAll(".scroll")].filter((box) => box.scrollWidth > box.clientWidth + 1)
  .map((box) => box.getAttribute("aria-label"))
"""


@pytest.fixture(scope="module", params=["run", "model"])
def page_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with eight experts, and of an analysed model with sixteen."""
    folder = tmp_path_factory.mktemp("reports") / request.param
    return write_report(full_run(folder) if request.param == "run" else analysed_model(folder))


@pytest.fixture(params=[(400, "light"), (400, "dark"), (1200, "light")], ids=str)
def opened(request: pytest.FixtureRequest, browser: Any, page_file: Path) -> Iterator[Any]:
    """The page in a window of a width, light or dark; nothing was asked of elsewhere, no error was told."""
    width, scheme = request.param
    page = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800}).new_page()
    told: list[str] = []
    page.on("console", lambda said: told.append(said.text) if said.type in ("error", "warning") else None)
    page.on("request", lambda asked: told.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None)
    page.goto(page_file.as_uri())
    yield page
    assert told == []
    page.context.close()


def test_nothing_scrolls_sideways_and_no_text_of_a_chart_covers_another(opened: Any) -> None:
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.evaluate(SIDEWAYS) == []
    assert opened.evaluate(COVERED) == []
    sizes = opened.evaluate(
        "[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height)"
    )
    assert len(sizes) > 50
    assert min(sizes) > 9  # points of a screen


def test_data_of_the_page_are_read_by_a_program(opened: Any) -> None:
    data = opened.evaluate("JSON.parse(document.getElementById('run-data').textContent)")
    assert data["charts"]["kept"]["curves"][0]["label"] == "mean"


def test_the_page_prints_on_white_with_every_view(browser: Any, page_file: Path) -> None:
    page = browser.new_context(color_scheme="dark", viewport={"width": 680, "height": 1000}).new_page()  # A4
    page.goto(page_file.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 251)"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.evaluate("[...document.querySelectorAll('.tokens')].every(t => t.scrollHeight <= t.clientHeight + 1)")
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.context.close()
