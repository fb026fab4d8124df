"""The page of btx serve in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where btx serves a mixture with four experts."""
    from tests.pico_models import mixtral

    folder = mixtral(tmp_path_factory.mktemp("served") / "moe")
    (folder / "mix.json").write_text(json.dumps({"experts": ["math", "code", "wiki", "generalist"]}))
    command = [sys.executable, "-m", "btx", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        said = iter(serving.stdout.readline, "")
        yield next(address[0] for line in said if (address := re.search(r"http://\S+:\d+", line)))
        serving.terminate()
        assert serving.wait(20) is not None


class Watched:
    """A page, its errors, and where it asked."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.page = browser.new_context(**context).new_page()
        self.errors: list[str] = []
        self.asked: set[str] = set()
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(request.url.split("/")[2]))
        self.page.goto(address)
        self.page.wait_for_selector(".expert")

    def send(self, text: str) -> None:
        """Send a message, and wait for the whole answer."""
        self.page.fill("#text", text)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#send:not([disabled])")


@pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (400, "dark")])
def test_an_answer_streams_in_colours_and_a_token_shows_its_layers(
    browser: Any, address: str, width: int, scheme: str
) -> None:
    watched = Watched(browser, address, color_scheme=scheme, viewport={"width": width, "height": 800})
    page = watched.page
    watched.send("the sum of three")
    marks = page.locator(".tokens i.pair")
    assert marks.count() > 20
    assert "linear-gradient" in marks.first.evaluate("mark => getComputedStyle(mark).backgroundImage")
    marks.nth(3).focus()
    page.keyboard.press("Enter")
    assert page.locator("#strip .layer").count() == 2
    layer = page.locator("#strip .layer").first.bounding_box()
    on_top = "([x, y]) => document.elementFromPoint(x, y).closest('#strip') !== null"
    assert page.evaluate(on_top, [layer["x"] + 5, layer["y"] + 5]), "nothing lies over the token's panel"
    page.keyboard.press("Escape")
    assert page.locator("#layers").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing scrolls sideways"
    assert watched.errors == []
    assert watched.asked == {address.split("/")[2]}


def test_an_expert_can_be_used_alone_or_forbidden(browser: Any, address: str) -> None:
    watched = Watched(browser, address)
    page = watched.page
    page.click("text=code")
    watched.send("the sum")
    assert {mark.get_attribute("title") for mark in page.locator(".tokens i.pair").all()} == {"code"}
    page.click("#new")
    page.click("text=code")
    watched.send("the sum")
    titles = {mark.get_attribute("title") or "" for mark in page.locator(".tokens i.pair").all()}
    assert titles
    assert not any("code" in title for title in titles)
    assert watched.errors == []


def test_a_model_stands_beside_itself_without_an_expert(browser: Any, address: str) -> None:
    watched = Watched(browser, address)
    page = watched.page
    page.click("#settings summary")
    page.select_option("#beside", "moe")
    page.click("text=code")
    watched.send("the sum")
    first, second = (page.locator(f".turn .said:not(.mine) >> nth={place}") for place in (0, 1))
    assert {mark.get_attribute("title") for mark in first.locator("i.pair").all()} == {"code"}
    assert {mark.get_attribute("title") for mark in second.locator("i.pair").all()} != {"code"}
    assert abs(first.bounding_box()["y"] - second.bounding_box()["y"]) < 1
    assert watched.errors == []


def test_an_answer_comes_token_by_token(browser: Any, address: str) -> None:
    watched = Watched(browser, address)
    page = watched.page
    page.evaluate("""() => {
        window.counts = [];
        new MutationObserver(() => counts.push(document.querySelectorAll('.tokens i.pair').length))
            .observe(document.getElementById('talk'), { childList: true, subtree: true });
    }""")
    watched.send("the sum")
    counts = page.evaluate("counts")
    assert len({count for count in counts if count}) > 3
    assert counts == sorted(counts)


def test_an_answer_can_be_stopped_and_a_refusal_is_shown(browser: Any, address: str) -> None:
    watched = Watched(browser, address)
    page = watched.page
    page.click("#settings summary")
    page.fill("#max_tokens", "200")
    page.fill("#text", "the sum")
    page.keyboard.press("Enter")
    page.wait_for_selector(".tokens i.pair", state="attached")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:not([disabled])")
    assert page.locator("#problem").is_hidden()
    watched.send("three and " * 300)
    assert "shorten it" in page.inner_text("#problem")
