"""The commands as Python functions: what they return, as HTML and as pandas tables, and that a notebook stays alive."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas
import pytest

import btx
from btx.errors import CheckpointError, RunFolderError, UserError
from btx.process import Interrupted, Interrupts
from btx.python.results import Analysis, Comparison, Evaluation, SweepResults
from btx.reporting.notebook import Table, run_html, table_html
from btx.reporting.results import Cell
from btx.run_folder.folder import RunFolder
from btx.run_folder.stumps import clear_stumps
from tests.pico_run import pico_recipe, run_here
from tests.test_sweep import FAST, Here

SMALL = [*FAST, "finetune.tokens=512", "evaluate.tokens=500"]
HOSTILE = "<img src=x onerror=alert(1)>"


def nothing(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose models are trained and not measured yet."""
    recipe = pico_recipe(tmp_path_factory.mktemp("python"), "run", *SMALL)
    stages = [stage.name for stage in RunFolder(Path(recipe.run_folder), recipe).graph]
    return run_here(recipe, stages[: stages.index("finetune") + 1])[0]


@pytest.fixture(scope="module")
def evaluation(run: RunFolder) -> Evaluation:
    return btx.evaluate(run, log=nothing)


class Seen(HTMLParser):
    """Tags and text of a piece of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.text = list[str](), list[str](), ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""


def test_evaluate_measures_a_run_and_returns_its_results(run: RunFolder, evaluation: Evaluation) -> None:
    table = evaluation.to_pandas()
    assert list(table.index) == ["seed", "expert/birds", "expert/tools", "soup", "mix", "btx"]
    domains = ["birds", "tools", "general"]
    assert (
        table["bits_per_byte.mean"] - table[[f"bits_per_byte.{d}" for d in domains]].mean(axis=1)
    ).abs().max() < 1e-9
    assert table.loc["btx", "total_params"] > table.loc["seed", "total_params"]
    assert (table["stderr.birds"] > 0).all()
    lines: list[str] = []
    again = btx.evaluate(str(run.path), log=lines.append)
    assert lines == ["evaluate: already done, skipped"]
    pandas.testing.assert_frame_equal(again.to_pandas(), table)


def test_compare_says_how_sure_differences_are(run: RunFolder, evaluation: Evaluation) -> None:
    found = btx.compare(run, "btx", "seed", resamples=200)
    assert isinstance(found, Comparison)
    table = found.to_pandas()
    assert list(table.columns) == ["other", "set", "difference", "low", "high", "p"]
    assert set(table["set"]) == {"mean", "learning", "keeping", "birds", "tools", "general"}
    assert (table["low"] <= table["high"]).all()
    means = evaluation.to_pandas()["bits_per_byte.birds"]
    row = table[table["set"] == "birds"].iloc[0]
    assert row["difference"] == pytest.approx(means["btx"] - means["seed"])
    assert "btx minus the other" in Seen(found._repr_html_()).text
    assert list(btx.compare(run).to_pandas()["other"].unique()) == [
        "seed",
        "expert/birds",
        "expert/tools",
        "soup",
        "mix",
    ]
    with pytest.raises(UserError, match="'gpt'"):
        btx.compare(run, "gpt")


def test_analyze_says_which_experts_domains_use(run: RunFolder) -> None:
    found = btx.analyze(run, log=nothing)
    assert isinstance(found, Analysis)
    table = found.to_pandas()
    assert set(table["expert"]) == {"birds", "tools", "generalist"} == set(found.experts)
    sums = table.groupby(["domain", "layer"])["load"].sum()
    assert len(sums) == 3 * found.layers
    assert (sums - 1).abs().max() < 1e-3
    assert Seen(found._repr_html_()).tags.count("tr") == 1 + len(sums)


def test_other_models_stand_beside_the_runs(run: RunFolder, evaluation: Evaluation, tmp_path: Path) -> None:
    copied = _copied(run, tmp_path)
    beside = btx.evaluate(copied, {"again": run.model("seed")}, log=nothing).to_pandas()
    assert beside.loc["again", "bits_per_byte.mean"] == pytest.approx(beside.loc["seed", "bits_per_byte.mean"])
    assert "again" not in btx.evaluate(copied, forget=["again"], log=nothing).models
    with pytest.raises(UserError, match="the run has a model of this name"):
        btx.evaluate(copied, {"btx": run.model("seed")})
    with pytest.raises(UserError, match=r"forget: a list is wanted, here \['again'\]"):
        btx.evaluate(copied, forget="again")


def test_one_text_is_no_list_of_values_whatever_the_key() -> None:
    with pytest.raises(UserError, match=r"vary models: a list is wanted, here \['btx'\]"):
        btx.sweep("demo", {"models": "btx"})


def test_what_goes_with_a_model_is_refused_for_a_run(run: RunFolder) -> None:
    settings: list[dict[str, Any]] = [{"without": ["tools"]}, {"tokens": 7}, {"examples": 0}, {"output": "there"}]
    for given in settings:
        with pytest.raises(UserError, match="is a run, which is analysed on its own held-out text"):
            btx.analyze(run, **given)


def test_folders_are_given_as_paths_or_as_text(run: RunFolder, tmp_path: Path) -> None:
    seed, birds, tools, there = (str(each) for each in (run.model("seed"), run.model("train/birds"),
                                                        run.model("train/tools"), tmp_path))  # fmt: skip
    btx.mix(seed, {"birds": birds}, f"{there}/mixed")
    btx.extend(f"{there}/mixed", "tools", tools, f"{there}/more")
    assert btx.drop(f"{there}/more", "birds", f"{there}/less")["experts"] == ["generalist", "tools"]
    btx.soup(seed, {"birds": birds}, f"{there}/soup")
    assert RunFolder.open(str(run.path)).path == run.path
    assert btx.write_report(str(run.path), f"{there}/report") == tmp_path / "report" / "index.html"


def test_an_adoption_that_was_killed_when_the_branch_had_given_way_is_ended_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = run_here(pico_recipe(tmp_path), ["data", "seed"])
    stage, rename = run.graph["train/birds"], Path.rename
    btx.adopt(run, "birds", run.model("seed"), log=nothing)

    def until_it_takes_the_place(path: Path, target: Path) -> Path:
        if path.name == ".birds.adopting":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", until_it_takes_the_place)
        with pytest.raises(KeyboardInterrupt):
            btx.adopt(run, "birds", shutil.copytree(run.model("seed"), tmp_path / "other"), log=nothing)
    assert run.state(stage) == "absent"
    clear_stumps(run := RunFolder.open(run.path))
    assert run.state(run.graph["train/birds"]) == "done"
    assert (run.done("train/birds") or {})["adopted"]["from"] == str(tmp_path / "other")
    assert list(run.folder("train").glob(".*")) == []


@pytest.mark.long
def test_any_mixed_model_is_analysed_on_any_text(run: RunFolder, tmp_path: Path) -> None:
    texts = {"a": run.path.parent / "birds.jsonl", "b": run.path.parent / "tools.jsonl"}
    found = btx.analyze(run.model("mix"), texts, tmp_path / "analysis", tokens=300, examples=0, log=nothing)
    assert set(found.to_pandas()["domain"]) == {"a", "b"}
    assert found.experts == ["birds", "tools", "generalist"]
    assert (tmp_path / "analysis" / "index.html").is_file()
    with pytest.raises(CheckpointError, match="dense model"):
        btx.analyze(run.model("seed"), texts, tmp_path / "other")
    with pytest.raises(UserError, match="texts go with a model"):
        btx.analyze(run, texts)


def test_adopt_takes_an_expert_in(run: RunFolder, tmp_path: Path) -> None:
    adopted = btx.adopt(_copied(run, tmp_path), "birds", run.model("train/tools"), log=nothing)
    assert adopted.state(adopted.graph["train/birds"]) == "done"
    assert (adopted.done("train/birds") or {})["adopted"]["from"] == str(run.model("train/tools"))
    with pytest.raises(UserError, match="no branch 'law'"):
        btx.adopt(adopted, "law", run.model("train/tools"))
    with pytest.raises(CheckpointError, match="nowhere"):
        btx.adopt(adopted, "birds", tmp_path / "nowhere")


def _copied(run: RunFolder, folder: Path) -> Path:
    return Path(shutil.copytree(run.path, folder / "copy"))


@pytest.mark.long
def test_sweep_returns_every_run_of_every_variant(
    run: RunFolder, evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btx.sweeps.starting.starter", lambda jobs: Here())
    overrides = [f"data.root={run.path.parent}", f"run={tmp_path / 'sweep'}", *SMALL]
    found = btx.sweep(run.path.parent / "pico.yaml", {"mix.top_k": [2, 1]}, overrides, rng_seeds=1, share=[run.path],
                      log=nothing)  # fmt: skip
    assert isinstance(found, SweepResults)
    table = found.to_pandas()
    assert set(table["rng_seed"]) == {3}
    ours = table[table["model"] == "btx"].set_index("variant")
    assert list(ours.index) == ["mix.top_k=2", "mix.top_k=1"]
    assert ours.loc["mix.top_k=1", "active_params"] < ours.loc["mix.top_k=2", "active_params"]
    measured = evaluation.to_pandas().loc["btx"]
    for column in ("bits_per_byte.birds", "bits_per_byte.mean"):
        assert ours.loc["mix.top_k=2", column] == measured[column]
    assert "mix.top_k=1" in Seen(found._repr_html_()).text


def test_a_sweep_that_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pico_recipe(tmp_path)
    with pytest.raises(UserError, match="no variant has a model 'gpt'"):
        btx.sweep(tmp_path / "pico.yaml", {"mix.top_k": [1, 2]}, [f"data.root={tmp_path}", f"run={tmp_path / 'sweep'}"],
                  models=["gpt"])  # fmt: skip
    assert not (tmp_path / "sweep").exists()


def test_what_a_recipe_has_not_is_not_aligned(run: RunFolder) -> None:
    with pytest.raises(UserError, match="the recipe has no `align`"):
        btx.align(run)


def test_align_trains_what_the_recipe_has(run: RunFolder) -> None:
    folder = run.path.parent
    talk = {"messages": [{"role": "user", "content": "owl?"}, {"role": "assistant", "content": "nests"}]}
    (folder / "chat.jsonl").write_text(8 * (json.dumps(talk) + "\n"))
    shutil.copytree(run.path, folder / "aligned")
    chat = ["align.sft.data=chat.jsonl", "align.sft.learning_rate=1e-3", "align.sft.batch_tokens=128"]
    prepared = RunFolder.create(pico_recipe(folder, "aligned", *SMALL, *chat))
    aligned = btx.align(prepared, log=nothing)
    assert aligned.state(aligned.graph["align/sft"]) == "done"
    assert (aligned.model("align/sft") / "model.safetensors").is_file()


@pytest.mark.parametrize("call", [btx.evaluate, btx.analyze, btx.compare, btx.align])
def test_what_is_no_run_is_an_exception(call: Any, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run folder"):
        call(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["adopt", "align", "analyze", "compare", "evaluate", "sweep"])
def test_a_function_has_the_name_of_its_command_and_says_what_it_raises(name: str) -> None:
    from btx.cli.main import _commands

    assert name in _commands().commands
    assert "Raises" in (inspect.getdoc(getattr(btx, name)) or "")


def test_what_docs_show_works(
    run: RunFolder,
    evaluation: Evaluation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All but what trains: that is in the notebooks, which have tests of their own."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "my").symlink_to(run.path)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "python.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    left_out = [block for block in blocks if re.search(r"btx\.(run|sweep)\(", block)]
    assert len(blocks) - len(left_out) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        code = compile(block, "docs/python.md", "exec")
        if block not in left_out:
            exec(code, names)
    said = capsys.readouterr().out
    assert "no such folder here" in said
    assert "GB of disk" in said
    assert set(re.findall(r"`btx\.(\w+)\(", page)) <= {*btx.__all__}


# In a notebook


def test_a_run_shows_its_results_and_costs(run: RunFolder, evaluation: Evaluation) -> None:
    html = run._repr_html_()
    seen = Seen(html)
    for name in ("seed", "expert/birds", "soup", "mix", "btx"):
        assert name in seen.text
    assert f"{evaluation.models['btx']['mean_bits_per_byte']:.3f}" in seen.text
    assert seen.tags.count("svg") == 1
    assert not {"script", "link", "iframe", "img"} & set(seen.tags)
    assert not re.search(r"(href|src)=\"?https?:|url\((?!#)", html)
    outside = re.sub(r"\.btx[^{}]*\{[^{}]*\}", "", html[html.index("<style>") + 7 : html.index("</style>")])
    assert re.fullmatch(r"\s*(@media[^{]*\{\s*\}\s*)*", outside), "nothing outside the piece is styled"
    assert Seen(evaluation._repr_html_()).text.count("expert/birds") == 1


def test_a_run_under_way_shows_how_far_it_is(tmp_path: Path) -> None:
    run = RunFolder.create(pico_recipe(tmp_path))
    assert "not evaluated yet" in Seen(run._repr_html_()).text
    (run.path / "train/birds").mkdir(parents=True)
    (run.path / "train/birds/metrics.jsonl").write_text('{"step": 2, "steps": 8, "loss": 3.5}\n{"step"')
    text = Seen(run_html(run.path)).text
    assert re.search(r"train/birds\s*begun\s*2/8\s*3\.500", text)


def test_hostile_names_stay_text() -> None:
    html = table_html(
        Table([HOSTILE], [(HOSTILE, [Cell(HOSTILE, HOSTILE, exact='" onmouseover="x')])], HOSTILE), title=HOSTILE
    )
    seen = Seen(html)
    assert "img" not in seen.tags
    assert seen.text.count(HOSTILE) == 6
    assert 'title="&#34; onmouseover=&#34;x"' in html


def test_without_pandas_it_says_what_to_install(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        evaluation.to_pandas()


def test_a_run_in_a_thread_listens_to_no_signals(run: RunFolder) -> None:
    before, found = signal.getsignal(signal.SIGINT), list[Any]()

    def work() -> None:
        try:
            interrupts = Interrupts().listen()
            found.append(signal.getsignal(signal.SIGINT))
            interrupts.unlisten()
            found.append(btx.evaluate(run, log=nothing).models.keys())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0] is before
    assert "btx" in found[1]


@pytest.mark.long
def test_an_interrupt_saves_and_the_same_call_goes_on(run: RunFolder, tmp_path: Path) -> None:
    """As a kernel's interrupt comes: SIGINT, in the main thread, while a cell works."""
    copied = RunFolder.open(_copied(run, tmp_path))
    shutil.rmtree(copied.path / "evaluate", ignore_errors=True)
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(line: str) -> None:
        if line.startswith("seed"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        btx.evaluate(copied, log=interrupted)
    assert signal.getsignal(signal.SIGINT) is handler
    lines: list[str] = []
    assert "btx" in btx.evaluate(copied, log=lines.append).models
    assert lines[0] == "seed: measured before, kept"


def test_a_second_interrupt_leaves_the_process_of_a_prompt_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    interrupts = Interrupts().listen()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        interrupts._since -= 10
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        interrupts.unlisten()
