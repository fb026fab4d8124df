"""The model card says what there is, whatever that is called: nothing from a file or a folder's name becomes markup."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from btx.cli.terminal import show
from btx.mixing.extend import extend
from btx.mixing.mix import mix
from btx.markdown_text import literal

MakeLlama = Callable[..., Path]
HOSTILE = (
    "a | b\n---\n# <script>alert(1)</script> ![x](http://e/x.png) [y](javascript:z) `code` **b** &lt; http://e $x$"
)
FOLDER = "m|<img src=x onerror=alert(1)>`[l](http:evil)"  # a folder's name has no slash


def parsed(text: str) -> list[Token]:
    """Everything the renderer makes of Markdown, inline tokens too."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    return [one for token in tokens for one in (token, *(token.children or ()))]


def cells(text: str, row: int) -> list[str]:
    """Contents of a row of the table after `## Inputs`."""
    tokens = parsed(text.partition("## Inputs")[2].partition("##")[0])
    texts = [token.content for token in tokens if token.type == "inline"]
    return texts[4 * row : 4 * row + 4]


@pytest.mark.parametrize("text", [HOSTILE, FOLDER, "math.v2", "feed_forward", "_a_ __b__", "~~x~~", "\\", "a@b.c", ""])
def test_literal_text_is_shown_as_it_is_in_one_line(text: str) -> None:
    found = parsed(f"| {literal(text)} | x |\n|---|---|\n| {literal(text)} | y |")
    assert {token.type for token in found} <= {
        *(f"{name}_{side}" for name in ("table", "thead", "tbody", "tr", "th", "td") for side in ("open", "close")),
        "inline", "text", "text_special",
    }  # fmt: skip
    shown = ["".join(child.content for child in token.children or ()) for token in found if token.type == "inline"]
    assert shown == [" ".join(text.split()), "x", " ".join(text.split()), "y"]


def test_hostile_names_stay_names_in_the_card(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, math, output = make_llama("seed"), make_llama(FOLDER, 1), tmp_path / "moe"
    mix(seed, {"math": math}, output)
    record = json.loads((output / "mix.json").read_text())
    cards = [(output / "README.md").read_text()]
    record["experts"][0] = HOSTILE
    record["inputs"][HOSTILE] = record["inputs"].pop("math") | {"path": HOSTILE}
    record["inputs"][HOSTILE]["weights"][0] |= {"file": HOSTILE, "sampled_sha256": "`</code>abc"}
    record |= {"warnings": [HOSTILE], "family": HOSTILE, "merge": {"method": HOSTILE, HOSTILE: HOSTILE}}
    (output / "mix.json").write_text(json.dumps(record))
    extend(output, "more", seed, tmp_path / "moe2")
    cards.append((tmp_path / "moe2" / "README.md").read_text())
    for card in cards:
        _, front, body = card.split("---\n", 2)
        assert yaml.safe_load(front)["library_name"] == "transformers"
        tokens = parsed(body)
        assert {token.content for token in tokens if token.type.startswith("html")} <= {"<br>"}
        assert [token.attrs["href"] for token in tokens if token.type == "link_open"] == [
            "https://arxiv.org/abs/2403.07816"
        ]
        assert not [token for token in tokens if token.type == "image"]
        assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1"] + ["h2"] * 4
    assert FOLDER in parsed(cells(cards[0], 2)[1])[1].content.replace("\\", "").replace("&lt;", "<").replace(
        "&gt;", ">"
    )
    assert len(cells(cards[1], 3)) == 4


def test_brackets_and_colons_in_tables_of_the_terminal_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    values: list[Any] = ["/runs/[/b]/x", "[red]x[/red]", ":apple:"]
    table = Table(title="runs in [/i]")
    table.add_row(*values)
    show(table, *values)
    printed = capsys.readouterr().out
    assert all(printed.count(value) == 2 for value in values)
    assert "runs in [/i]" in printed
