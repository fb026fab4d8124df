"""The report in a real browser, opened as a file: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from btx.reporting.report import write_report
from tests.reader_data import document, run_with, token_file
from tests.report_data import full_run

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with everything in it; another run, with single letters as tokens, stands beside it."""
    folder = full_run(tmp_path_factory.mktemp("shown") / "demo", domains=2, layers=3)
    run_with(folder, token_file())
    letters = token_file()
    for example in letters["examples"]:
        example |= document(example["domain"], list("".join(example["tokens"]))) | {"losses": {}, "routes": {}}
    return write_report(folder, beside=run_with(folder.parent / "letters", letters))


class Watched:
    """A page, its errors, and what it asked for."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.page = browser.new_context(**context).new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda said: self.said.append(said.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.address = path.as_uri()
        self.reader = self.page.locator(".reader.documents")
        self.tokens = self.reader.locator(".sides > :first-child i")
        self.panel = self.reader.locator(".panel")
        self.status = self.reader.locator("output")

    def choose(self, name: str, label: str) -> None:
        self.reader.locator(f"select[name={name}]").select_option(label=label)

    def pinned(self) -> str:
        return str(self.reader.locator("i[aria-selected]").inner_text())

    def is_quiet(self) -> bool:
        """Nothing on the console, and nothing asked for but the file."""
        return self.said == [] and {url for url in self.asked if not url.startswith("data:")} == {self.address}


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (400, "dark"), (400, "light")])
def test_a_click_on_a_token_shows_gates_of_all_layers_and_its_bits(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    watched = Watched(browser, report, color_scheme=scheme, viewport={"width": width, "height": 800})
    page = watched.page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing scrolls sideways"
    assert page.locator("figure svg").count() > 5
    assert "linear-gradient" in watched.tokens.first.evaluate("mark => getComputedStyle(mark).backgroundImage")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")
    watched.choose("beside", "no other model")
    watched.choose("baseline", "soup")
    watched.tokens.nth(1).click()
    text = watched.panel.inner_text()
    assert '" has"' in text
    assert text.count("0.75") == 3, "gates of three layers"
    assert all(name in text for name in ("seed", "expert/math", "expert/code", "btx", "soup"))
    assert "mix" not in text, "one baseline, the chosen one"
    bits = watched.panel.locator("table").first.locator("td:last-child")
    assert max(bits.evaluate_all("cells => cells.map(cell => cell.clientHeight)")) < 30, "no number is broken"
    page.keyboard.press("Escape")
    assert watched.panel.is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing scrolls sideways"
    assert watched.is_quiet(), watched.said


def test_tokens_are_reached_and_pinned_by_keyboard(browser: Any, report: Path) -> None:
    watched = Watched(browser, report)
    keys = watched.page.keyboard
    watched.tokens.first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "Enter"):
        keys.press(key)
    assert watched.pinned() == " +", "under ' has' in the next line"
    keys.press("End")
    keys.press(" ")
    assert watched.panel.locator("code").inner_text() == '"\\n"'
    assert watched.page.evaluate("document.activeElement.tabIndex") == 0
    assert watched.is_quiet(), watched.said


def test_documents_are_filtered_by_domain_and_tokens_by_expert_and_layer(browser: Any, report: Path) -> None:
    watched = Watched(browser, report)
    shown = watched.reader.locator("article:not([hidden]) h3")
    assert shown.count() == 6
    watched.choose("domain", "code")
    assert [text.split(" ")[0] for text in shown.all_inner_texts()] == ["code"] * 2
    watched.choose("layer", "0")
    watched.choose("expert", "math")
    dim = [mark.endswith("dim") for mark in watched.tokens.evaluate_all("marks => marks.map(mark => mark.className)")]
    assert dim[:6] == [False, True, False] * 2, "experts t and t + 1 of 3"
    assert watched.is_quiet(), watched.said


def test_search_goes_from_match_to_match_over_documents(browser: Any, report: Path) -> None:
    watched = Watched(browser, report)
    box = watched.reader.locator("input[name=search]")
    box.fill("ed, SO sh")
    box.press("Enter")
    assert watched.status.inner_text() == "1 of 6"
    assert watched.pinned() == " rained"
    box.press("Enter")
    assert watched.status.inner_text() == "2 of 6"
    assert "general" in watched.panel.inner_text()
    box.fill("nowhere")
    box.press("Enter")
    assert watched.status.inner_text() == "none"
    assert watched.is_quiet(), watched.said


def test_the_next_surprising_token_is_the_one_with_most_bits_or_most_above_the_seed_model(
    browser: Any, report: Path
) -> None:
    watched = Watched(browser, report)
    watched.reader.locator("button[name=next]").click()
    assert watched.status.inner_text() == "1 of 252: 12.25 bits"
    assert watched.pinned() == " h"
    assert "12.25" in watched.panel.inner_text()
    watched.choose("by", "btx needs fewer bits than the seed model")
    watched.reader.locator("button[name=next]").click()
    assert watched.status.inner_text() == "1 of 251: 0.50 bits fewer than the seed model"
    watched.choose("by", "btx needs more bits than the seed model")
    watched.reader.locator("button[name=next]").click()
    assert watched.status.inner_text().startswith("1 of 1: ")
    assert watched.pinned() == " h"
    assert watched.is_quiet(), watched.said


def test_two_models_stand_side_by_side_and_their_tokens_meet_by_characters(browser: Any, report: Path) -> None:
    watched = Watched(browser, report, viewport={"width": 1200, "height": 800})
    article = watched.reader.locator("article").first
    assert article.locator("h4").all_inner_texts() == ["btx", "letters"]
    watched.tokens.nth(1).click()
    assert article.locator("i.same").all_inner_texts() == [" ", "h", "a", "s"]
    assert watched.panel.locator("caption", has_text="letters").count() == 4
    watched.choose("beside", "mix")
    watched.tokens.nth(1).click()
    assert article.locator("i.same").all_inner_texts() == [" has"]
    assert watched.is_quiet(), watched.said


def test_answers_show_their_tokens_gold_and_other_models(browser: Any, report: Path) -> None:
    watched = Watched(browser, report)
    answers = watched.page.locator(".reader.answers")
    card = answers.locator("article").first
    assert all(text in card.inner_text() for text in ("What of math?", "btx, right", "gold answer", "seed, wrong"))
    card.locator(".tokens i").nth(2).click()
    assert '" 5"' in answers.locator(".panel").inner_text()
    assert watched.is_quiet(), watched.said


def test_without_its_script_the_page_still_shows_coloured_tokens(browser: Any, report: Path) -> None:
    watched = Watched(browser, report, java_script_enabled=False)
    assert watched.tokens.count() == 252
    assert watched.reader.locator("form").is_hidden()
    assert watched.page.get_by_text("with scripts allowed there are the others").first.is_visible()


def test_twenty_thousand_tokens_are_shown_some_at_a_time(browser: Any, tmp_path: Path) -> None:
    watched = Watched(browser, write_report(run_with(tmp_path / "long", token_file(count=200, documents=34))))
    assert watched.tokens.count() == 1200
    watched.reader.get_by_label("next documents").click()
    assert watched.reader.locator(".turn").inner_text().split() == ["‹", "2", "of", "17", "›"]
    assert watched.tokens.count() == 1200
    watched.reader.locator("button[name=next]").click()
    assert "12.25" in watched.status.inner_text()
    assert watched.is_quiet(), watched.said


def test_printed_tokens_keep_their_colours_and_controls_are_left_out(browser: Any, report: Path) -> None:
    watched = Watched(browser, report, color_scheme="light")
    watched.page.emulate_media(media="print")
    assert watched.reader.locator("form").is_hidden()
    assert watched.tokens.first.evaluate("mark => getComputedStyle(mark).printColorAdjust") == "exact"
    assert watched.reader.locator(".tokens").first.evaluate("box => getComputedStyle(box).maxHeight") == "none"
