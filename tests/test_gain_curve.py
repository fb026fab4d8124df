"""Gain against tokens a parameter: rows and figure are what sweeps have measured, beside what the law predicts."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from btx.evaluation.aggregate import aggregate
from btx.files import read_json, write_json
from btx.models.cost import config_cost
from btx.planning.costs import dense_config
from btx.planning.plan import plan
from btx.sweeps.variants import plan_sweep
from tests.pico_run import pico_recipe, run_here

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DOMAINS = ("birds", "tools", "general")
BITS = {"seed": (3.0, 3.0, 2.0), "expert/birds": (2.5, 3.2, 2.1), "expert/tools": (3.2, 2.5, 2.1),
        "dense_cm": (2.0, 2.2, 1.8), "upcycling_cm": (2.1, 2.2, 1.7), "btx": (2.3, 2.3, 1.5)}  # fmt: skip


@pytest.fixture(scope="module")
def gain() -> Iterator[ModuleType]:
    """benchmarks/gain.py, imported as its command line does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("gain")


def results(more: float = 0.0) -> dict[str, Any]:
    """results.json; btx needs `more` bits per byte than it did."""
    return {"models": {
        name: {"domains": {domain: {"bits_per_byte": value + more * (name == "btx")}
                           for domain, value in zip(DOMAINS, bits, strict=True)}, "flops": 3e9}
        for name, bits in BITS.items()
    }}  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder: one variant, one run of which the data are there."""
    folder = tmp_path_factory.mktemp("runs")
    run, _ = run_here(
        pico_recipe(folder, "sweep/pico/rng-0"), ["data/tokenizer", *(f"data/{name}" for name in DOMAINS)]
    )
    bytes_of = {"domains": {domain: [100.0] * 30 for domain in DOMAINS}}
    bits = {name: {"domains": {domain: [100 * bits[place] + number % 3 * (name == "btx") for number in range(30)]
                               for place, domain in enumerate(DOMAINS)}, "tasks": {}}
            for name, bits in BITS.items()}  # fmt: skip
    write_json(run.path / "evaluate" / "documents.json", {"bytes": bytes_of, "models": bits})
    return write_sweep(folder / "sweep", [results()])


def write_sweep(folder: Path, runs: list[dict[str, Any]]) -> Path:
    found = aggregate(runs) | {"rng_seeds": list(range(len(runs)))}
    written = {"name": "law", "variants": {"pico": {"aggregated": found}, "begun": {"aggregated": None}}}
    write_json(folder / "sweep.json", written)
    return folder


def test_a_row_holds_gains_over_dense_part_by_part_and_what_plan_predicts(gain: ModuleType, sweep: Path):
    (row,) = gain.sweep_rows(sweep)
    assert gain.sweep_rows(sweep / "pico") == [row]
    gains = {label: {part: value for part, (value, _) in parts.items()} for label, parts in row["gains"].items()}
    assert gains["btx"] == pytest.approx({"mean": -0.1 / 3, "learning": -0.2, "keeping": 0.3})
    assert gains["upcycling"] == pytest.approx({"mean": 0.0, "learning": -0.05, "keeping": 0.1})
    # Documents' bits are 0, 1 or 2 of 100 bytes off: a spread of 0.0082, over 30 documents 0.0015 a domain.
    assert row["errors"] == "documents"
    assert row["gains"]["btx"]["keeping"][1] == pytest.approx(0.0015, abs=0.0002)
    assert row["gains"]["btx"]["learning"][1] == pytest.approx(0.0015 / 2**0.5, abs=0.0002)

    recipe = pico_recipe(sweep.parent, "sweep/pico/rng-0")
    planned = plan(recipe)
    assert row["parameters"] == planned["models"]["seed"]["total_params"]
    assert row["tokens_per_parameter"] == pytest.approx(planned["prediction"]["tokens_per_parameter"])
    flops = planned["models"]["btx"]["flops"]
    law, _, _ = gain._law(gain.RunFolder.open(sweep / "pico" / "rng-0"), flops)
    assert law(row["tokens_per_parameter"]) == pytest.approx(planned["prediction"]["gain"])
    assert [at for at, _ in row["law"]] == gain.LAW_AT


def test_errors_of_several_rng_seeds_are_over_them(gain: ModuleType, sweep: Path, tmp_path: Path):
    folder = write_sweep(tmp_path / "several", [results(), results(0.02)])
    (folder / "pico").symlink_to(sweep / "pico")
    (row,) = gain.sweep_rows(folder)
    assert (row["rng_seeds"], row["errors"]) == (2, "rng seeds")
    assert row["gains"]["btx"]["keeping"] == pytest.approx([0.29, 0.01])
    assert row["gains"]["upcycling"]["keeping"] == pytest.approx([0.1, 0.0])


def test_what_is_no_sweep_or_has_nothing_to_compare_is_said(gain: ModuleType, sweep: Path, tmp_path: Path):
    with pytest.raises(SystemExit, match=r"no sweep\.json"):
        gain.sweep_rows(tmp_path)
    with pytest.raises(SystemExit, match="no finished variant; variants: pico, begun"):
        gain.sweep_rows(sweep / "begun")
    short = results()
    del short["models"]["dense_cm"]
    with pytest.raises(SystemExit, match="no results of dense_cm"):
        gain.sweep_rows(write_sweep(tmp_path / "short", [short]))


def row(ratio: float, predicted: float, mean: float, error: float | None, name: str = "law") -> dict[str, Any]:
    gains = {label: {"mean": [mean, error]} for label in ("btx", "upcycling")}
    return {"name": name, "parameters": 393_792, "tokens_per_parameter": ratio, "rng_seeds": 3, "errors": None,
            "predicted": predicted, "law": [[ratio, predicted], [2 * ratio, 0.0]], "gains": gains}  # fmt: skip


def test_a_prediction_is_judged_by_its_sign_where_that_is_no_chance(gain: ModuleType):
    cases = {(0.01, 0.03, 0.001): "confirmed", (-0.01, 0.03, 0.001): "refuted", (-0.01, 0.03, 0.02): "open",
             (0.01, 0.004, None): "open", (-0.01, -0.02, None): "confirmed"}  # fmt: skip
    assert {case: gain.verdict(row(6.0, *case)) for case in cases} == cases


def test_the_results_page_says_what_is_kept(gain: ModuleType):
    page = (Path(__file__).parents[1] / "docs" / "results.md").read_text("utf-8")
    measured = [row for row in read_json(gain.HERE / "gain.json") if "law" in row]
    assert len(measured) >= 8
    for line in gain.table(measured).splitlines()[2:]:
        cells = line.split(" | ")
        assert f"| {' | '.join(cells[3:-1])} |" in page, line


def test_rows_are_kept_replaced_and_drawn_with_the_refuted_beside_the_confirmed(
    gain: ModuleType, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    kept, drawn = tmp_path / "gain.json", tmp_path / "gain.svg"
    write_json(kept, [row(24.0, 0.02, -0.01, 0.001, "refuted one"), row(6.0, -0.01, -0.02, 0.001)])
    for _ in range(2):  # the second time the sweep's row takes the place of the first
        monkeypatch.setattr("sys.argv", ["gain", str(sweep), "--rows", str(kept), "--figure", str(drawn)])
        gain.main()
    assert [one["tokens_per_parameter"] for one in read_json(kept)] == sorted(
        one["tokens_per_parameter"] for one in read_json(kept)
    )
    assert [one["name"] for one in read_json(kept)] == ["law, pico", "law", "refuted one"]
    said = capsys.readouterr().out
    assert "| refuted one | 394k | 24.0 | 3 | +0.020 | −0.010 ± 0.001 | −0.010 ± 0.001 |  |  |  |  | refuted |" in said
    text = drawn.read_text("utf-8")
    ElementTree.fromstring(text)
    for label in ("394k btx", "394k upcycling", "394k law", "learning", "keeping"):
        assert label in text, label
    assert "NaN" not in text
    assert re.search(r"--c1", text)  # sizes are colours


def test_a_law_s_line_and_sizes_have_one_colour_in_all_panels(gain: ModuleType):
    small = row(6.0, -0.01, -0.02, 0.001)
    large = row(12.0, 0.01, 0.02, None) | {"parameters": 1_030_000}
    chart = gain.GainChart("gain-mean", [small, large], "mean")
    figure = chart.draw(lambda name: {"c0": "red", "c1": "blue"}.get(name, "black"))
    (axes,) = figure.axes
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_color() for line in dashed] == ["red", "blue"]
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize("recipe", ["gain", str(BENCHMARKS / "gain_1m.yaml"), str(BENCHMARKS / "gain_2m.yaml")])
def test_every_point_of_the_experiment_has_the_tokens_a_parameter_of_its_name(recipe: str):
    runs = plan_sweep(recipe, ["data.root=."], rng_seeds=1).runs
    assert runs
    for run in runs:
        read = run.recipe.seed_model.train.tokens
        after = len(run.recipe.train.domains) * run.recipe.train.tokens + run.recipe.finetune.tokens
        parameters = config_cost(dense_config(run.run_folder)).total_params
        assert read / parameters == pytest.approx(int(run.variant.label.removeprefix("at_")), rel=2e-3)
        assert after / read == pytest.approx(1 / 3, rel=2e-3)
        assert run.recipe.finetune.tokens / after == pytest.approx(3 / 4, rel=2e-3)
