"""The report: one offline page with the run's numbers; hostile text is harmless, missing stages are tolerated."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from btx.cli.terminal import show
from btx.errors import RunFolderError
from btx.number_texts import count_text, duration_text, evenly, flops_text, signed_percent
from btx.publishing import hub_card
from btx.reporting.charts import CostChart, CostPoint, bucket_means
from btx.reporting.drawing import Chart, spread
from btx.reporting.headline import headline
from btx.reporting.notebook import run_html
from btx.reporting.paired_bootstrap import compare_documents, may_be_chance
from btx.reporting.readers import script
from btx.reporting.report import write_report
from btx.reporting.results import report_table, results_table
from btx.reporting.tokens import own_expert
from tests.report_data import DRAW, write

DOMAINS = ["math", "code", "knowledge", "general"]
EXPERTS = ["math", "code", "knowledge", "generalist"]
LAYERS = 4
BITS = {
    "seed": (0.954, 2.063, 1.446, 2.088),
    "expert/math": (0.719, 2.091, 1.471, 2.101),
    "expert/code": (0.969, 1.949, 1.463, 2.095),
    "expert/knowledge": (0.962, 2.077, 1.316, 2.099),
    "soup": (0.841, 2.003, 1.377, 2.097),
    "mix": (0.766, 1.972, 1.327, 2.090),
    "btx": (0.709, 1.938, 1.313, 2.072),
}
EXACT = {
    "seed": (0.035, 0.12),
    "expert/math": (0.42, 0.1),
    "expert/code": (0.03, 0.11),
    "expert/knowledge": (0.035, 0.575),
    "soup": (0.11, 0.25),
    "mix": (0.31, 0.47),
    "btx": (0.455, 0.61),
}
TEXTS = {
    "math": "Question: Tom has 14 apples and buys 5 more bags with 3 apples each.\nAnswer: 5 * 3 = 15, 14 + 15 = 29.\n",
    "code": "def area(width, height):\n    total = width * height\n    return total\n",
    "knowledge": "The river Alda rises in the hills of Morven and ends at Port Kell, a town of 4100 people.\n",
    "general": "On Monday it rained, so she stayed at home, read two letters and wrote one; then the sun came out.\n",
}
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "</style>",
    "<!--",
    "&lt;b&gt;",
    "{{ 7 * 7 }}",
    "\ud83d",
    "\u202eevil",
]


pytestmark = pytest.mark.usefixtures("figures_drawn_once")


def results() -> dict[str, Any]:
    models = {}
    for i, (name, bits) in enumerate(BITS.items()):
        sparse = name in ("mix", "btx")
        models[name] = {
            "domains": {
                d: {"bits_per_byte": x, "stderr": 0.006, "tokens": 200_000, "bytes": 712_345}
                for d, x in zip(DOMAINS, bits, strict=True)
            },
            "tasks": {
                t: {
                    "exact_match": x,
                    "stderr": math.sqrt(x * (1 - x) / 200),
                    "questions": 200,
                    "examples": answers(t, name),
                }
                for t, x in zip(("arithmetic", "facts"), EXACT[name], strict=True)
            },
            "mean_bits_per_byte": sum(bits) / 4,
            "flops": (1.21e13, 2.4e12, 2.4e12, 2.4e12, 7.2e12, 7.2e12, 1.1e13)[i],
            "tokens": (2_400_000, 500_000, 500_000, 500_000, 1_500_000, 1_500_000, 1_900_000)[i],
            "hours": (0.11, 0.033, 0.033, 0.033, 0.099, 0.099, 0.142)[i],
            "active_params": 1_730_000 if sparse else 1_140_000,
            "total_params": 2_910_000 if sparse else 1_140_000,
        }
    models["btx"] |= {
        "machine_hours": 0.142,
        "peak_memory_bytes": 1_230_000_000,
        "inference_flops_per_token": 3.6e6,
        "predicted": {"tokens": 1_950_000, "flops": 1.15e13, "memory_bytes": 640_000_000, "machine_hours": 0.125},
        "matched": {"flops_ratio": 1.004, "hours_ratio": None},
    }
    return {"models": models}


def answers(task: str, model: str) -> list[dict[str, Any]]:
    good = model == "btx"
    asked = [
        ("What is 17 + 26?", "43"),
        ("What is 9 * 7?", "63"),
        ("What is 81 - 55?", "26"),
        ("What is 64 / 4?", "16"),
        ("What is 13 * 12?", "156"),
    ]
    if task == "facts":
        asked = [
            (f"Where does the river {river} end?", town)
            for river, town in (
                ("Alda", "Port Kell"),
                ("Brin", "Lowmouth"),
                ("Cessa", "Tarn Bay"),
                ("Dove", "Ostby"),
                ("Esk", "Marl"),
            )
        ]
    rows = []
    for i, (prompt, gold) in enumerate(asked):
        right = good and i % 2 == 0
        output = gold if right else "I think it is 144" if task == "arithmetic" else "Port Mar"
        rows.append({"prompt": f"Question: {prompt}\nAnswer:", "output": f" {output}", "gold": gold, "correct": right})
    return rows


def pair_shares(rng: random.Random, own: int) -> dict[str, list[float]]:
    """Share of tokens of each pair of experts in each layer; pairs with the domain's own expert are frequent."""
    pairs = list(itertools.combinations(range(4), 2))
    weights = [[rng.uniform(0.3, 1.0) * (2 + layer if own in pair else 1) for pair in pairs] for layer in range(LAYERS)]
    return {
        f"{EXPERTS[a]}+{EXPERTS[b]}": [weights[layer][i] / sum(weights[layer]) for layer in range(LAYERS)]
        for i, (a, b) in enumerate(pairs)
    }


def routing(rng: random.Random) -> dict[str, Any]:
    domains = {}
    for own, domain in enumerate(DOMAINS):
        pairs = pair_shares(rng, own)
        load = [
            [sum(shares[layer] for pair, shares in pairs.items() if name in pair.split("+")) / 2 for name in EXPERTS]
            for layer in range(LAYERS)
        ]
        domains[domain] = {"load": load, "pairs": pairs}
    return {"layers": LAYERS, "experts": EXPERTS, "domains": domains, "dead": [[3, 1]]}


def tokens(rng: random.Random) -> dict[str, Any]:
    examples = []
    for own, domain in enumerate(DOMAINS):
        texts = re.findall(r"\s|\s?\w{1,5}|\s?[^\w\s]", TEXTS[domain] * 4)
        if domain == "code":
            texts = texts[:40] + HOSTILE + texts[40:]
        ids, gates = [], []
        for _ in texts:
            row_ids, row_gates = [], []
            for layer in range(LAYERS):
                first = own if rng.random() < 0.5 + 0.1 * layer else rng.randrange(4)
                second = rng.choice([e for e in range(4) if e != first])
                gate = rng.uniform(0.5, 0.95)
                row_ids.append([first, second])
                row_gates.append([gate, 1 - gate])
            ids.append(row_ids)
            gates.append(row_gates)
        examples.append({"domain": domain, "tokens": texts, "experts": ids, "gates": gates})
    return {"layers": LAYERS, "experts": EXPERTS, "examples": examples}


def metrics(rng: random.Random, steps: int, start: float, end: float, moe: bool = False) -> str:
    lines = []
    for step in range(1, steps + 1):
        share = step / steps
        row: dict[str, Any] = {
            "step": step,
            "tokens": step * 4096,
            "loss": end + (start - end) * math.exp(-5 * share) + rng.gauss(0, 0.04),
            "learning_rate": 1e-3 * (1 - 0.9 * share),
            "tokens_per_s": 8000 + rng.gauss(0, 200),
            "flops": 2.6e10 * step,
            "grad_norm": 0.8,
            "wall_s": 0.5 * step,
        }
        if moe:
            row["load_balancing"] = 1.02 + 0.5 * math.exp(-6 * share) + rng.gauss(0, 0.01)
            shares = [0.25 + (0.1 - 0.05 * e) * math.exp(-4 * share) + rng.gauss(0, 0.01) for e in range(4)]
            row["load"] = [[x / sum(shares) for x in shares]] * LAYERS
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


def build_run(run: Path) -> Path:
    """A finished run folder with plausible numbers."""
    rng = random.Random(7)
    write(
        run / "recipe.yaml",
        "name: demo\ndescription: 'Three domains, a small seed model: <minutes> on a laptop.'\n"
        "data:\n  general: general\ntrain:\n  domains: [math, code, knowledge]\n  tokens: 500000\nmix:\n  top_k: 2\n",
    )
    write(
        run / "manifest.json",
        {
            "command": "btx run demo",
            "git": {"commit": "0f3c9a1", "dirty": False},
            "versions": {"btx": "0.1.0", "torch": "2.13.0"},
            "recipe_sha256": "9f2b" * 16,
        },
    )
    write(run / "seed" / "metrics.jsonl", metrics(rng, 580, 7.6, 3.1))
    for i, domain in enumerate(DOMAINS[:3]):
        write(run / "train" / domain / "metrics.jsonl", metrics(rng, 120, 3.0 + 0.2 * i, 2.2 + 0.3 * i))
        write(
            run / "train" / domain / "done.json", {"inputs": "ab", "tokens": 500_000, "flops": 2.4e12, "wall_s": 118.4}
        )
    write(run / "finetune" / "metrics.jsonl", metrics(rng, 98, 2.75, 2.4, moe=True))
    (run / "finetune" / "model").mkdir()
    write(run / "seed" / "done.json", {"inputs": "aa", "tokens": 2_400_000, "flops": 1.21e13, "wall_s": 396.0})
    write(run / "mix" / "done.json", {"inputs": "ac", "tokens": 0, "flops": 0, "wall_s": 1.7})
    write(run / "finetune" / "done.json", {"inputs": "ad", "tokens": 400_000, "flops": 3.8e12, "wall_s": 155.2})
    write(
        run / "mix" / "mix.json",
        {
            "experts": EXPERTS,
            "diagnostics": {
                "embeddings": {"tensors": 1, "mean_cosine": 0.271, "mean_norm_ratio": 0.713},
                "attention": {"tensors": 16, "mean_cosine": 0.187, "mean_norm_ratio": 0.679},
                "norms": {"tensors": 9, "mean_cosine": None, "mean_norm_ratio": None},
            },
        },
    )
    for stage in ("data", "evaluate", "analyze"):
        write(run / stage / "done.json", {"inputs": "ae", "tokens": 0, "flops": 0.0, "wall_s": 12.5})
    write(run / "evaluate" / "results.json", results())
    write(run / "analyze" / "routing.json", routing(rng))
    write(run / "analyze" / "tokens.json", tokens(rng))
    return run


class Page(HTMLParser):
    """The page as a browser's parser sees it: its elements, their attributes, and the text of chosen elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[str] = []
        self.rows: list[list[str]] = []
        self._in_token = False
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "i":
            self._in_token = True
            self.tokens.append("")
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self._in_cell = True
            if self.rows:
                self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_token = self._in_token and tag != "i"
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_token:
            self.tokens[-1] += data
        elif self._in_cell and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


FILES = ["cost.png", "domains.png", "index.html", "learning.png", "models.svg", "report.md", "routing.png"]


def test_the_report_is_one_file_under_two_megabytes_with_its_figures_as_files_beside(run: Path, html: str) -> None:
    assert sorted(path.name for path in (run / "report").iterdir()) == FILES
    assert not [name for name in FILES if name in html]  # the page needs no other file
    assert 20_000 < len(html.encode()) < 2_000_000


def test_equal_runs_give_equal_pages(run: Path, html: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, draw in DRAW.items():
        monkeypatch.setattr(Chart, kind, draw)  # drawn anew
    assert write_report(run).read_text(encoding="utf-8") == html


def test_a_failing_report_leaves_the_earlier_one_alone(tmp_path: Path) -> None:
    run = build_run(tmp_path / "demo")
    before = write_report(run).read_bytes()
    write(run / "evaluate" / "results.json", "{ broken")
    with pytest.raises(RunFolderError, match=r"results\.json: not readable as JSON"):
        write_report(run)
    assert (run / "report" / "index.html").read_bytes() == before
    assert sorted(path.name for path in (run / "report").iterdir()) == FILES


def test_the_page_forbids_everything_but_its_own_script_styles_and_inline_images(html: str) -> None:
    policies = [
        attrs["content"]
        for tag, attrs in Page(html).elements
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1
    rules = dict(rule.strip().split(" ", 1) for rule in policies[0].split(";"))
    assert rules == {
        "default-src": "'none'",
        "script-src": f"'{script()[1]}'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_the_page_refers_to_nothing_outside_itself(html: str) -> None:
    page = Page(html)
    references = [
        value
        for _, attrs in page.elements
        for key, value in attrs.items()
        if key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
    ]
    assert references
    assert all(value.startswith(("#", "data:")) for value in references)
    assert re.findall(r"url\((?!#)|@import|https?://", html) == []
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert {value[1:] for value in references if value.startswith("#")} <= ids


JSON = {"type": "application/json"}
SCRIPTS = [JSON, JSON | {"id": "run-data"}, {}]
"""The tokens' data, the run's data, the page's own script."""


def test_hostile_text_is_shown_and_never_becomes_markup(run: Path, html: str) -> None:
    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "iframe", "object", "embed", "b>"}
    assert [attrs for tag, attrs in page.elements if tag == "script"] == SCRIPTS
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]
    assert html.count("</style>") == 1
    for text in HOSTILE:
        assert text.encode("utf-8", "replace").decode() in page.tokens


def test_hostile_names_and_answers_are_harmless_too(tmp_path: Path) -> None:
    run = build_run(tmp_path / "demo")
    evil = "<script>alert(1)</script>"
    changed = results()
    changed["models"][evil] = changed["models"]["soup"]
    changed["models"]["btx"]["tasks"]["arithmetic"]["examples"][0]["output"] = evil
    write(run / "evaluate" / "results.json", changed)
    write(run / "manifest.json", {"command": evil, "versions": {evil: evil}, "recipe_sha256": evil, evil: {evil: evil}})
    write(run / "recipe.yaml", f"name: '{evil}'\n")
    page = write_report(run).read_text(encoding="utf-8")
    assert [attrs for tag, attrs in Page(page).elements if tag == "script"] == SCRIPTS
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5


def test_every_token_of_the_examples_is_shown_with_its_pair_of_experts(run: Path, html: str) -> None:
    page = Page(html)
    examples = json.loads((run / "analyze" / "tokens.json").read_text())["examples"]
    expected = [
        text.replace("\n", "↵\n").encode("utf-8", "replace").decode()
        for example in examples
        for text in example["tokens"]
    ]
    assert page.tokens == expected
    chosen = [(DOMAINS.index(example["domain"]), row) for example in examples for row in example["experts"]]
    shown = [attrs["class"] for tag, attrs in page.elements if tag == "i"]
    for classes, (own, pairs) in zip(shown, chosen, strict=True):
        a, b = pairs[LAYERS // 2]
        place = " first" if own == a else " second" if own == b else ""
        assert classes == f"a{a} b{b}{place}"


def test_the_numbers_in_the_table_are_those_of_the_results(html: str) -> None:
    rows = {row[0].split("\n")[0]: row[1:] for row in Page(html).rows if row and "±" in "".join(row)}
    for name, model in results()["models"].items():
        row = next(cells for title, cells in rows.items() if title.startswith(name))
        numbers = [cell.split()[0] for cell in row]
        assert numbers[:4] == [f"{model['domains'][d]['bits_per_byte']:.3f}" for d in DOMAINS]
        assert numbers[4] == f"{model['mean_bits_per_byte']:.3f}"
        assert numbers[5:7] == [f"{100 * model['tasks'][t]['exact_match']:.1f}" for t in ("arithmetic", "facts")]
        assert row[0].split()[1:] == ["±", "0.006"]
    assert next(cells for title, cells in rows.items() if title.startswith("btx"))[7:] == [
        "1.9M",
        "1.10e13",
        "8 min 31 s",
        "1.73M",
        "2.91M",
    ]


def test_the_best_of_each_column_is_marked() -> None:
    view = results_table(results())
    best = {row.name: [cell.best for cell in (*row.domains, *row.means, *row.tasks)] for row in view.rows}
    assert all(best.pop("btx"))
    assert not any(any(marks) for marks in best.values())


def test_gains_are_the_share_of_the_seed_models_bits_that_is_saved() -> None:
    rows = {row.name: row.gains for row in results_table(results()).rows}
    assert rows["seed"] == [0.0] * 5
    assert rows["expert/math"][0] == pytest.approx((0.954 - 0.719) / 0.954)
    assert rows["expert/math"][1] < 0


def test_the_headline_compares_btx_with_seed_soup_mix_and_the_best_expert(html: str) -> None:
    line = headline(results())
    assert line is not None
    assert [c.name for c in line.comparisons] == ["seed", "soup", "mix", "expert/math"]
    assert line.comparisons[0].change == pytest.approx((1.508 - 1.63775) / 1.63775)
    assert [(t.task, t.seed, t.btx) for t in line.tasks] == [("arithmetic", 0.035, 0.455), ("facts", 0.12, 0.61)]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", html))
    assert "btx needs 1.508 bits per byte on average over 4 held-out domains" in text
    assert "7.9 % less than the seed model" in text
    assert "Exact match on arithmetic rises from 3.5 % to 45.5 %." in text


def paired_documents() -> dict[str, Any]:
    """300 documents, apart by far more than the models: the mix is a little worse than btx in each of them, the soup
    in about half, and better by as much in the other half."""
    drawn = np.random.default_rng(0)
    bits = drawn.normal(1000, 300, 300)
    worse = {"btx": 0.0, "seed": 80.0, "mix": 2.0 + drawn.normal(0, 1, 300), "soup": drawn.normal(0, 40, 300),
             "expert/math": 50.0}  # fmt: skip
    right = {"seed": [0.0, 1.0] * 20, "btx": [0.0, 1.0] * 19 + [1.0, 1.0]}
    models = {name: {"domains": {"math": (bits + more).tolist()}, "tasks": {"facts": right.get(name, right["seed"])}}
              for name, more in worse.items()}  # fmt: skip
    return {"bytes": {"domains": {"math": [800] * 300}}, "models": models}


def test_scores_of_other_documents_are_named(run: Path, tmp_path: Path) -> None:
    documents = paired_documents()
    documents["models"]["mix"]["domains"]["math"].pop()
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "evaluate" / "documents.json").write_text(json.dumps(documents), "utf-8")
    with pytest.raises(RunFolderError, match=r"models\.mix: math has 299 documents, bytes has 300"):
        write_report(copy)


def test_differences_are_judged_in_pairs_as_btx_compare_does(run: Path, tmp_path: Path) -> None:
    documents = paired_documents()
    line = headline(results(), documents)
    assert line is not None
    assert {c.name: may_be_chance(c.p) for c in line.comparisons} == {
        "seed": False, "soup": True, "mix": False, "expert/math": False
    }  # fmt: skip
    assert {t.task: may_be_chance(t.p) for t in line.tasks} == {"arithmetic": False, "facts": True}
    for comparison in line.comparisons:
        told = compare_documents(documents["models"]["btx"], documents["models"][comparison.name], documents["bytes"])
        assert comparison.p == told["mean"]["p"]
    unknown = headline(results())
    assert unknown is not None
    assert {c.p for c in unknown.comparisons} == {None}
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "evaluate" / "documents.json").write_text(json.dumps(documents), "utf-8")
    text = re.sub(r"\s+", " ", write_report(copy).read_text("utf-8"))
    assert re.search(r"the soup \(which may be chance: p = 0\.\d\d\)", text)
    assert "mix before finetuning (which" not in text


def test_the_headline_does_not_hide_the_baseline_that_wins() -> None:
    found = results()
    best = found["models"]["btx"]["mean_bits_per_byte"]
    for name, mean in (("dense_cm", best + 0.2), ("upcycling_cm", best - 0.1), ("btm_top2", best + 0.3)):
        found["models"][name] = {**found["models"]["seed"], "mean_bits_per_byte": mean}
    line = headline(found)
    assert line is not None
    last = line.comparisons[-1]
    assert (last.name, last.label) == ("upcycling_cm", "the best baseline (upcycling_cm)")
    assert last.change > 0
    assert [c.name for c in line.comparisons].count("soup") == 1


def test_a_worse_btx_is_reported_as_worse(tmp_path: Path) -> None:
    run = build_run(tmp_path / "demo")
    worse = results()
    worse["models"]["btx"]["mean_bits_per_byte"] = 1.75
    write(run / "evaluate" / "results.json", worse)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", write_report(run).read_text(encoding="utf-8")))
    assert "6.9 % more than the seed model" in text


@pytest.mark.parametrize(
    "gone", ["recipe.yaml", "manifest.json", "seed", "train", "mix", "finetune", "evaluate", "analyze"]
)
def test_a_run_without_one_of_its_parts_still_gets_a_report(tmp_path: Path, gone: str) -> None:
    run = build_run(tmp_path / "demo")
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = write_report(run).read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")


def test_an_empty_run_folder_gets_a_page_that_names_what_is_missing(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text(encoding="utf-8")
    for sentence in (
        "has not reached evaluation yet",
        "No stage of this run is finished yet",
        "has not reached the routing analysis yet",
        "no recipe.yaml",
        "no manifest.json",
    ):
        assert sentence in page
    assert "<svg" not in page


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no such run folder"):
        write_report(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(("text", "message"), [
    (b"- a\n", "input should be a valid dictionary"), (b"train: {domains: [[a]]}", r"train\.domains\.0: .*string"),
    (b"mix:\n", "mix: input should be"), (b"name: \xff", "can't decode"),
])  # fmt: skip
def test_a_recipe_that_is_none_is_refused_in_a_sentence(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(text)
    with pytest.raises(RunFolderError, match=f"recipe.yaml: .*{message}"):
        write_report(tmp_path)


def test_an_unfinished_last_line_of_metrics_is_left_out_and_any_other_broken_line_is_named(tmp_path: Path) -> None:
    run = build_run(tmp_path / "demo")
    path = run / "seed" / "metrics.jsonl"
    good = path.read_text()
    whole = write_report(run).read_bytes()
    path.write_text(good + '{"step": 581, "tok')
    assert write_report(run).read_bytes() == whole
    path.write_text("{oops\n" + good)
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:1: not a JSON object"):
        write_report(run)


def test_the_last_of_two_lines_for_one_step_counts(tmp_path: Path) -> None:
    from btx.reporting.run_files import read_run

    write(
        tmp_path / "seed" / "metrics.jsonl",
        '{"step": 1, "loss": 9}\n{"step": 2, "loss": 8}\n{"step": 2, "loss": 7}\n{"step": 3, "loss": 6}\n',
    )
    assert [row["loss"] for row in read_run(tmp_path).stage("seed").metrics] == [9, 7, 6]


def test_charts_follow_the_pages_colours_and_carry_no_date(html: str) -> None:
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    # Gains in 4 domains, in learning and keeping, cost; seed, experts, finetuning, load balancing, load; own load.
    assert len(charts) == 13
    for chart in charts:
        assert "currentColor" in chart
        assert re.findall(r"#[0-9a-f]{6}", re.sub(r'(href="|url\()#\w+', "", chart)) == []
        assert "<metadata" not in chart
        assert "font-family" not in chart
    assert "var(--c0)" in charts[8]


def test_the_figures_file_is_an_image_that_stands_alone(run: Path, html: str) -> None:
    root = ElementTree.parse(run / "report" / "models.svg").getroot()
    assert float(root.get("width", 0)) > 300
    text = (run / "report" / "models.svg").read_text("utf-8")
    for variable in set(re.findall(r"var\((--\w+)\)", text)):
        assert f"{variable}: #" in text, variable  # every colour is defined in the file
    names = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for model in json.loads((run / "evaluate" / "results.json").read_text())["models"]:
        assert model in names


def test_a_circles_area_is_the_active_parameters_and_error_bars_are_as_long_as_the_error() -> None:
    points = [CostPoint("small", "c0", 0.0, 2.0, 1e6), CostPoint("large", "c1", 1e9, 1.0, 4e6, error=0.1)]
    svg = CostChart(points).svg()
    small, large = (float(radius) for radius in re.findall(r'd="M 0 ([\d.]+) \nC', svg))
    assert (large / small) ** 2 == pytest.approx(4.0, rel=1e-4)
    line = re.search(r'd="M [\d.]+ ([\d.]+) \nL [\d.]+ ([\d.]+) \n"[^>]*stroke: var\(--c1\)', svg)
    heights = [float(y) for y in re.findall(r'<use xlink:href="#m\w+" x="[\d.]+" y="([\d.]+)" style="fill: var', svg)]
    assert line is not None
    # The circles are 1.0 bits per byte apart, the bar's ends 2 · 0.1.
    assert float(line[1]) - float(line[2]) == pytest.approx(0.2 * (heights[1] - heights[0]), rel=1e-3)


def test_the_routing_tables_hold_the_shares_in_percent(run: Path, html: str) -> None:
    shown = [row[1:] for row in Page(html).rows if row and row[0] in ("0", "1", "2", "3")]
    found = json.loads((run / "analyze" / "routing.json").read_text())["domains"]
    expected = []
    for domain in DOMAINS:
        expected += [[f"{100 * share:.1f}" for share in layer] for layer in found[domain]["load"]]
        expected += [
            [f"{100 * shares[layer]:.1f}" for shares in found[domain]["pairs"].values()] for layer in range(LAYERS)
        ]
    assert shown == expected
    assert "code in layer 3" in html


def test_layers_shown_run_evenly_from_first_to_last() -> None:
    assert evenly(4, 8) == [0, 1, 2, 3]
    assert evenly(32, 8) == [0, 4, 9, 13, 18, 22, 27, 31]


def test_the_generalist_is_the_general_domains_own_expert() -> None:
    assert own_expert("general", EXPERTS, "general") == 3
    assert own_expert("code", EXPERTS, "general") == 1
    assert own_expert("law", EXPERTS, "general") is None


def test_the_mixed_set_has_a_column_of_its_own_where_it_was_measured(run: Path, tmp_path: Path) -> None:
    from rich.console import Console

    measured = results()
    assert results_table(measured).means == ["mean"]
    for number, model in enumerate(measured["models"].values()):
        model["mixed"] = {"bits_per_byte": 3.125 - number / 64, "stderr": 0.031, "tokens": 9, "bytes": 9}
    table = results_table(measured)
    assert [row.means[-1].best for row in table.rows] == [False] * (len(table.rows) - 1) + [True]
    assert table.rows[0].means[-1].text == "3.125"
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "evaluate" / "results.json").write_text(json.dumps(measured), "utf-8")
    assert "3.125" in write_report(copy).read_text("utf-8")
    console = Console(file=io.StringIO(), width=200)
    console.print(report_table(measured))
    assert "mixed" in console.file.getvalue()  # type: ignore[attr-defined]


def test_learning_and_keeping_stand_beside_the_mean_wherever_results_are_shown(run: Path, tmp_path: Path) -> None:
    from rich.console import Console

    measured = results()
    for number, model in enumerate(measured["models"].values()):
        model |= {"learning_bits_per_byte": 1.5 + number / 8, "keeping_bits_per_byte": 2.5 - number / 8}
    table = results_table(measured)
    assert table.means == ["mean", "learning", "keeping"]
    assert [cell.best for cell in table.rows[0].means] == [False, True, False]
    assert [cell.best for cell in table.rows[-1].means] == [True, False, True]
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "evaluate" / "results.json").write_text(json.dumps(measured), "utf-8")
    page = write_report(copy).read_text("utf-8")
    console = Console(file=io.StringIO(), width=200)
    console.print(report_table(measured))
    told = [page, (copy / "report" / "report.md").read_text("utf-8"), run_html(copy),
            "".join(hub_card._results(measured)), console.file.getvalue()]  # type: ignore[attr-defined]  # fmt: skip
    for text in told:
        assert re.search(r"mean\W.{0,12}\Wlearning\W.{0,12}\Wkeeping\W", text.replace("\n", "")), text[:2000]
        assert "1.500" in text


def test_the_terminal_table_holds_every_model_with_mean_and_exact_match() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=140)
    console.print(report_table(results()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    btx = next(line for line in text.split("\n") if line.strip().startswith(("btx", "│ btx")))
    assert re.findall(r"\d+\.\d+", btx) == ["0.709", "1.938", "1.313", "2.072", "1.508", "45.5", "61.0"]
    assert all(name in text for name in BITS)


def test_what_is_printed_of_the_table_has_no_marks_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    show(report_table(results()))
    assert "[" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999_600, "1M"),
        (1_140_000, "1.14M"),
        (1_390_000_000, "1.39B"),
        (None, "–"),
        (float("nan"), "–"),
        (123_456, "123k"),
    ],
)
def test_counts_are_short(value: Any, text: str) -> None:
    assert count_text(value) == text


def test_flops_durations_and_changes_are_readable() -> None:
    assert [flops_text(x) for x in (0, 1.2345e12, 9.99e9)] == ["0", "1.23e12", "9.99e9"]
    assert [duration_text(x) for x in (1.7, 59, 118.4, 12_000)] == ["1.7 s", "59 s", "1 min 58 s", "3 h 20 min"]
    assert signed_percent(-0.0792) == "−7.9 %"


def test_bucket_means_keep_the_mean_and_the_number_of_points_small() -> None:
    x, y = bucket_means(list(range(1000)), [2.0 * i for i in range(1000)], 50)
    assert len(x) == 50
    assert y == [2.0 * value for value in x]
    assert sum(y) / 50 == pytest.approx(999.0)
    assert bucket_means([1, 2], [3, 4], 50) == ([1, 2], [3, 4])


def test_labels_are_spread_without_overlap() -> None:
    placed = spread([0.1, 0.11, 0.5, 0.97, 0.98, 0.99], gap=0.1)
    assert placed == sorted(placed)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(placed))
    assert placed[-1] <= 1.0
    assert placed[0] == 0.1


def test_what_was_planned_stands_beside_what_was_measured(html: str) -> None:
    rows = Page(html).rows
    titles = next(row for row in rows if "peak memory" in row)
    cells = next(row for row in rows if len(row) == len(titles) and row[0] == "btx" and "planned" in row[1])
    measured = ["1.9M planned 1.95M", "1.10e13 planned 1.15e13", "1.2 GB planned 640 MB"]
    assert cells[1:5] == [*measured, "8 min 31 s planned 7 min 30 s"]
    assert cells[5:] == ["1.00", "–", "3.60e6"]
