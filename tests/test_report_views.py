"""The report's views answer their questions in sentences that are right; what was not measured is named or left out."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from btx.reporting import findings
from btx.reporting.alignment import aligned_models
from btx.reporting.charts import BarPanels
from btx.reporting.page_data import script_text
from btx.reporting.report import write_report
from btx.reporting.results import results_table
from btx.reporting.routing_view import not_measured, routing_view, uses, with_signs
from btx.reporting.run_files import Run, read_run
from btx.reporting.views import run_views
from tests.report_data import analysed_model, full_run, write

pytestmark = pytest.mark.usefixtures("figures_drawn_once")

SECTIONS = [
    "results", "cost", "training", "routing", "statistics", "experts", "lag", "kept", "tokens", "answers", "align",
    "mix", "use", "recipe", "manifest",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three experts in which everything was measured, with its report."""
    folder = full_run(tmp_path_factory.mktemp("runs") / "full", domains=2, layers=3, aligned=["sft"])
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "report" / "index.html").read_text("utf-8")


@pytest.fixture
def run(folder: Path) -> Run:
    return read_run(folder)


def with_routing(run: Run, **changed: Any) -> Run:
    """The run with other entries of routing.json."""
    return replace(run, routing=run.routing | changed)


def headings(html: str) -> list[str]:
    return re.findall(r'<h2 id="(\w+)">', html)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_every_view_asks_a_question_says_how_to_read_it_and_answers(html: str) -> None:
    assert headings(html) == SECTIONS
    titles = dict(re.findall(r'<h2 id="(\w+)">([^<]*)', html))
    assert not [name for name, title in titles.items() if not title.endswith("?") and name not in ("tokens", "answers")]
    for section in re.split(r"<section>", html)[1:]:
        name = re.search(r'<h2 id="(\w+)"', section)
        if name and name[1] in ("cost", "training", "routing", "statistics", "experts", "lag", "kept", "align"):
            assert "How to read it:" in section, name[1]
            assert '<p class="finding">' in section, name[1]


def test_the_page_carries_its_data_as_json(folder: Path, html: str) -> None:
    (text,) = re.findall(r'<script type="application/json" id="run-data">(.*?)</script>', html, flags=re.DOTALL)
    data = json.loads(text)
    assert data["results"] == json.loads((folder / "evaluate" / "results.json").read_text())
    assert data["routing"] == json.loads((folder / "analyze" / "routing.json").read_text())
    assert data["aligned"]["models"].keys() == {"sft"}
    assert {
        "cost",
        "domains",
        "lag",
        "kept",
        "own-load",
        "specialisation",
        "similarity",
        "shift-sft",
        "experts",
    } <= set(data["charts"])
    assert data["charts"]["lag"]["curves"][0]["y"] == data["routing"]["lag"]["new"]


def test_json_in_the_page_cannot_leave_its_element() -> None:
    hostile = {"</script><!--": ["<b>&", "\ud83d", float("nan"), float("inf"), 1.5, None, True]}
    text = script_text(hostile)
    assert not set("<>&") & set(text)
    text.encode("utf-8")
    assert json.loads(text) == {"</script><!--": ["<b>&", "\ud83d", None, None, 1.5, None, True]}


def test_a_run_of_an_earlier_version_is_rebuilt_and_what_it_has_not_is_named(folder: Path, tmp_path: Path) -> None:
    old = shutil.copytree(folder, tmp_path / "old")
    routing = json.loads((old / "analyze" / "routing.json").read_text())
    write(old / "analyze" / "routing.json", {key: routing[key] for key in ("layers", "experts", "domains", "dead")})
    (old / "analyze" / "align.json").unlink()
    page = write_report(old).read_text("utf-8")
    assert headings(page) == [name for name in SECTIONS if name not in ("statistics", "experts", "lag", "kept")]
    assert "Not measured here: statistics with intervals; what each expert is used for; how fast" in page
    assert "What sft changed in the routing has not been analysed yet" in page
    assert len(not_measured(read_run(folder))) == 0


def test_an_analysed_model_has_the_same_page_without_training(tmp_path: Path) -> None:
    folder = analysed_model(tmp_path / "analysis", experts=20, layers=3)
    page = write_report(folder).read_text("utf-8")
    assert headings(page) == ["routing", "statistics", "experts", "kept", "tokens"]
    assert "<h1>some/Mixture-16x</h1>" in page
    assert "Which expert reads which text?" in page
    assert "Training" not in re.sub(r"<style>.*?</style>|<script.*?</script>", "", page, flags=re.DOTALL)
    assert "btx run" not in page
    assert page.count("<table") > 5
    assert 'class="heat dense denser"' in page  # twenty columns fit a page
    text = (folder / "report" / "report.md").read_text("utf-8")
    assert text.startswith("# some/Mixture-16x\n")
    assert "seed model" not in text


def test_many_pairs_are_cut_to_the_most_frequent(tmp_path: Path) -> None:
    view = routing_view(read_run(full_run(tmp_path, domains=7, layers=2)))
    assert view is not None
    assert view["pairs_cut"] == 28
    for domain in view["domains"]:
        every = json.loads((tmp_path / "analyze" / "routing.json").read_text())["domains"][domain["name"]]["pairs"]
        least = min(sum(shares) for _, _, shares in domain["pairs"])
        assert len(domain["pairs"]) == 10
        assert sum(sum(shares) >= least for shares in every.values()) == 10


def test_a_share_tells_its_interval_where_one_points(html: str) -> None:
    assert re.search(r'title="math: [\d.]+ %, 95 %: [\d.]+ % to [\d.]+ %"', unescape(html))
    assert re.search(r'title="math\nlayer 0: [\d.]+ %\nlayer 1: ', html)


def test_tokens_of_an_expert_are_shown_with_their_spaces_and_escaped(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "run")
    routing = json.loads((copy / "analyze" / "routing.json").read_text())
    routing["used_for"]["math"]["tokens"] = [[" <b>x</b>", 0.8, 20], ["\n\t", 0.6, 12]]
    write(copy / "analyze" / "routing.json", routing)
    page = write_report(copy).read_text("utf-8")
    assert '<code title="20 occurrences">␣&lt;b&gt;x&lt;/b&gt; <small>80 %</small></code>' in page
    assert "↵⇥ <small>60 %</small>" in page
    assert with_signs(" a") == "␣a"


def test_bars_of_an_expert_are_its_shares(run: Run) -> None:
    for use in uses(run):
        classes = run.routing["used_for"][use["expert"]]["classes"]
        assert use["classes"] == [(name, share) for name, share in classes.items() if share >= 0.005]
        assert run.routing["experts"][use["number"]] == use["expert"]


# --- sentences --------------------------------------------------------------------------------------------------------


def test_the_lag_is_told_from_where_the_new_expert_leads_over_a_few_tokens(run: Run) -> None:
    old = [0.6, 0.5, 0.4, 0.4, 0.2, 0.2, 0.2, 0.2]
    lag = {"positions": [-1, 0, 1, 2, 3, 4, 5, 6], "old": old, "documents": 7}

    def told(new: list[float]) -> str:
        return findings.lag(with_routing(run, lag=lag | {"new": new}))

    # At position 0 the next four differ by -0.3, -0.2, -0.2, 0.3 from the old one's, at 1 by -0.2, -0.2, 0.3, 0.3.
    assert told([0.1, 0.2, 0.2, 0.2, 0.5, 0.5, 0.5, 0.5]) == (
        "The new domain's expert has the larger load from 1 token after the change on; 6 tokens after it takes 50.0 %, "
        "the old one 20.0 % (mean over 7 documents)."
    )
    assert told([0.1, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]).startswith(
        "The new domain's expert has the larger load at once;"
    )
    assert "does not overtake the old one's; 6 tokens after" in told([0.1] * 8)
    assert "routing does not tell the domains apart" in told([0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6])
    assert findings.lag(with_routing(run, lag=None)) == ""


@pytest.mark.parametrize(
    ("means", "sentence"),
    [
        (
            [2.0, 2.01, 2.4],
            "2 of 3 experts are within 1 % of all of them; with 1 alone bits per byte change by +20.0 %.",
        ),
        (
            [2.0, 2.1, 2.4],
            "Every one of the 3 experts counts: without the least used one bits per byte change by +5.0 %",
        ),
        ([2.0, 1.9, 1.8], "1 of 3 experts are within 1 % of all of them"),
        ([2.0, 2.1, 1.9], "Every one of the 3 experts counts"),
    ],
)
def test_fewer_experts_are_enough_while_all_steps_to_them_cost_little(
    run: Run, means: list[float], sentence: str
) -> None:
    kept = [{"experts": ["a", "b", "c"][: 3 - i], "domains": {}, "mean": mean} for i, mean in enumerate(means)]
    assert findings.kept(with_routing(run, kept=kept)).startswith(sentence)


def test_the_in_domain_experts_are_counted(run: Run) -> None:
    domains = {"math": {"load": [[0.8, 0.1, 0.1]]}, "code": {"load": [[0.5, 0.4, 0.1]]}}
    assert findings.routing(with_routing(run, domains=domains)) == (
        "In 1 of 2 domains the in-domain expert has the largest load; on average it takes 60.0 %, where an even load "
        "would give 33.3 %."
    )
    other = {"news": {"load": [[0.2, 0.7, 0.1], [0.2, 0.5, 0.3]]}}
    assert "The largest load of any expert in any domain is 60.0 % (expert code on news" in findings.routing(
        with_routing(run, domains=other)
    )


def test_an_expert_is_told_by_what_it_gets_more_of_than_the_others(run: Run) -> None:
    used_for = {"math": {"tokens": [], "classes": {"number": 0.3, "word start": 0.7}},
                "code": {"tokens": [], "classes": {"number": 0.1, "word start": 0.9}}}  # fmt: skip
    assert findings.used_for(with_routing(run, used_for=used_for)) == (
        "Measured against the other experts, each gets most of: math number (30 % of its tokens), code word start "
        "(90 % of its tokens)."
    )


def test_layers_are_told_with_their_intervals(run: Run) -> None:
    layers = [{"value": 0.1, "low": 0.05, "high": 0.15}, {"value": 0.4, "low": 0.3, "high": 0.5}]
    statistics = run.statistics | {"specialisation": layers, "similarity": [[1.0, 0.3], [0.3, 1.0]]}
    found = with_routing(run, statistics=statistics)
    assert (
        "most of the domain in layer 1, 0.400 (95 %: 0.300 to 0.500), and least in layer 0"
        in findings.specialisation(found)
    )
    assert findings.similarity(found) == "Of neighbouring layers, 0 and 1 route most alike (0.30; 1 is the same)."
    assert findings.specialisation(with_routing(run, statistics=statistics | {"specialisation": []})) == ""


def test_gains_name_the_best_and_the_worst_domain(run: Run) -> None:
    results = {"models": {"seed": {"domains": {"a": {"bits_per_byte": 2.0}, "b": {"bits_per_byte": 1.0}}},
                          "btx": {"domains": {"a": {"bits_per_byte": 1.5}, "b": {"bits_per_byte": 1.1}}}}}  # fmt: skip
    assert findings.gains(results_table(results)) == (
        "btx saves 25.0 % of the seed model's bits on a, where it gains most, and needs 10.0 % more bits than the seed "
        "model on b, where it gains least."
    )


def test_learning_and_keeping_are_told_apart(run: Run) -> None:
    def model(*bits: float) -> dict[str, Any]:
        return {"domains": {name: {"bits_per_byte": value} for name, value in zip("abc", bits, strict=True)}}

    results = {"models": {"seed": model(2.0, 1.8, 1.0), "btx": model(1.6, 1.2, 0.9), "dense_cm": model(1.5, 1.2, 0.97)}}
    sizes, same = {"a": [10.0] * 40, "b": [10.0] * 40, "c": [10.0] * 40}, [9.0, 10.0] * 20
    alike = {"domains": {"a": same, "b": same, "c": same}, "tasks": {}}
    turned = {"domains": {"a": [8.9, 9.9] * 20, "b": same, "c": same[::-1]}, "tasks": {}}
    found = replace(run, results=results, recipe={"train": {"domains": ["a", "b"]}},
                    documents={"bytes": {"domains": sizes}, "models": {"btx": alike, "dense_cm": turned}})  # fmt: skip
    assert findings.learning(found) == (
        "On the domains with a branch btx needs 1.400 bits per byte: 0.050 more than dense_cm, 0.500 fewer than seed; "
        "on all other text btx needs 0.900 bits per byte: 0.070 fewer than dense_cm (may be chance: p = 1.00), 0.100 "
        "fewer than seed."
    )
    chart = run_views(found)["learning"].chart
    assert isinstance(chart, BarPanels)
    assert chart.columns == ["learning", "keeping"]
    assert {bar.label: bar.values for bar in chart.bars} == {
        "btx": (pytest.approx(100 * 0.5 / 1.9), pytest.approx(10.0)),
        "dense_cm": (pytest.approx(100 * 0.55 / 1.9), pytest.approx(3.0)),
    }
    every = replace(found, recipe={"train": {"domains": ["a", "b", "c"]}})  # then the mean over the domains says it
    assert (run_views(every)["learning"].answer, run_views(every)["learning"].chart) == ("", None)


def test_before_and_after_alignment_stand_side_by_side(run: Run) -> None:
    (sft,) = aligned_models(run)
    rows = {row.measure: row for row in sft.changes}
    btx, after = (run.results["models"][name] for name in ("btx", "sft"))
    assert rows["bits per byte, math"].before == f"{btx['domains']['math']['bits_per_byte']:.3f}"
    assert rows["mean bits per byte"].after == f"{after['mean_bits_per_byte']:.3f}"
    assert rows["mean bits per byte"].better is False
    assert (rows["arithmetic"].change, rows["arithmetic"].better) == ("+24.0 points", True)
    assert "mean bits per byte" in sft.answer
    assert "arithmetic 36.0 % → 60.0 %" in sft.answer
    assert "bits per byte, math" not in sft.answer
    # Layers 0, 1, 2 of domain n move 0.02 + 0.03 n + 0.01 layer.
    assert sft.routing == (
        "sft sends 6.0 % of the tokens to another first expert than btx did, most on general (9.0 %)."
    )


def test_a_change_by_alignment_that_may_be_chance_is_no_gain_and_no_loss(run: Run) -> None:
    bits = {"domains": {"math": [800.0, 900.0, 1000.0] * 20}, "tasks": {}}
    noisy = {"domains": {"math": [830.0, 870.0, 1001.0] * 20}, "tasks": {}}
    documents = {"bytes": {"domains": {"math": [800.0] * 60}}, "models": {"btx": bits, "sft": noisy}}
    (sft,) = aligned_models(replace(run, documents=documents))
    row = next(row for row in sft.changes if row.measure == "bits per byte, math")
    assert row.may_be_chance
    assert row.better is None


# --- report.md --------------------------------------------------------------------------------------------------------


def test_the_short_report_is_markdown_whose_images_lie_beside_it(folder: Path) -> None:
    text = (folder / "report" / "report.md").read_text("utf-8")
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    images = [child.attrs["src"] for token in tokens for child in token.children or [] if child.type == "image"]
    assert images == [
        "domains.png",
        "learning.png",
        "cost.png",
        "routing.png",
        "specialisation.png",
        "similarity.png",
        "lag.png",
        "kept.png",
    ]
    for name in images:
        assert (folder / "report" / str(name)).read_bytes().startswith(b"\x89PNG")
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert titles[0] == "full"
    assert all(title.endswith("?") for title in titles[1:])
    html = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    for name, model in read_run(folder).results["models"].items():
        assert f"<td>{name}</td>" in html
        assert f"{model['mean_bits_per_byte']:.3f}" in html
    assert html.count("<table>") == 2


def test_names_in_the_short_report_are_no_markup(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "run")
    evil = "<img src=x>|**[x](http://evil)`"
    write(copy / "recipe.yaml", f"name: '{evil}'\ndescription: '{evil}'\n")
    results = json.loads((copy / "evaluate" / "results.json").read_text())
    results["models"][evil] = results["models"].pop("soup")
    write(copy / "evaluate" / "results.json", results)
    write_report(copy)
    html = MarkdownIt("gfm-like", {"linkify": False}).render((copy / "report" / "report.md").read_text("utf-8"))
    assert "evil" in html
    assert "<img src=x" not in html
    assert "href" not in html
    assert unescape(html).count(evil) >= 4  # title, description, a row in both tables


def test_an_empty_folder_gets_a_short_report_too(tmp_path: Path) -> None:
    write_report(tmp_path)
    assert (
        (tmp_path / "report" / "report.md")
        .read_text("utf-8")
        .startswith(f"# {tmp_path.name.replace('_', chr(92) + '_')}")
    )
