"""Paired bootstrap: against cases whose answer is known, and as a command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from btx.cli.main import app
from btx.errors import RunFolderError, UserError
from btx.evaluation.compare import compare_models
from btx.files import write_json
from btx.python.results import sets_of
from btx.reporting.paired_bootstrap import compare_documents, read_documents, resampled_ratios
from btx.reporting.results import results_table
from btx.run_folder.folder import RunFolder
from tests.pico_run import pico_recipe

N = 400


def scores(bits: np.ndarray, right: np.ndarray, mixed: bool = True) -> dict[str, Any]:
    entry = {"domains": {"math": bits.tolist(), "code": (2 * bits).tolist()}, "tasks": {"quiz": right.tolist()}}
    return entry | ({"mixed": bits[:50].tolist()} if mixed else {})


def two_models(gap: float, noise: float) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Documents differ by far more than the models do: unpaired errors would hide the gap."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(50, 400, N)
    hardness = sizes * rng.normal(2, 0.5, N)
    worse = hardness + sizes * rng.normal(gap, noise, N)
    known = rng.random(N) < 0.4
    first, second = scores(hardness, known.astype(int)), scores(worse, known.astype(int))
    sizes_of = {"domains": {"math": sizes.tolist(), "code": sizes.tolist()}, "mixed": sizes[:50].tolist()}
    return first, second, sizes_of


def test_a_gap_far_smaller_than_the_documents_spread_is_found_because_it_is_paired():
    first, second, sizes = two_models(gap=0.02, noise=0.05)
    found = compare_documents(first, second, sizes)
    math = found["domains"]["math"]
    assert math["low"] < -0.02 < math["high"] < 0
    assert math["p"] < 0.01
    exact = (np.sum(first["domains"]["math"]) - np.sum(second["domains"]["math"])) / np.sum(sizes["domains"]["math"])
    assert math["difference"] == pytest.approx(exact)
    assert found["domains"]["code"]["difference"] == pytest.approx(2 * exact)
    assert found["mean"]["difference"] == pytest.approx(1.5 * exact)
    assert found["mixed"]["low"] < found["mixed"]["difference"] < found["mixed"]["high"]
    back = compare_documents(second, first, sizes)["domains"]["math"]
    assert (back["low"], back["high"]) == pytest.approx((-math["high"], -math["low"]))


def test_models_that_differ_by_chance_are_not_told_apart_and_equal_ones_have_p_1():
    first, second, sizes = two_models(gap=0.0, noise=0.05)
    found = compare_documents(first, second, sizes)["mean"]
    assert found["low"] < 0 < found["high"]
    assert found["p"] > 0.05
    same = compare_documents(first, first, sizes)
    assert same["mean"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert same["tasks"]["quiz"]["p"] == 1.0


def test_a_single_document_tells_no_difference_apart() -> None:
    first, second = ({"domains": {"a": [bits], "b": [bits] * 50}, "tasks": {"t": [0]}} for bits in (1.0, 2.0))
    found = compare_documents(first, second, {"domains": {"a": [10.0], "b": [10.0] * 50}})
    nothing = {"difference": pytest.approx(-0.1), "low": pytest.approx(-0.1), "high": 0.0, "p": 1.0}
    assert found["mean"] == found["domains"]["a"] == nothing
    assert found["domains"]["b"]["p"] < 0.01
    assert found["tasks"]["t"]["p"] == 1.0


def test_a_domain_that_is_called_like_a_mean_stands_beside_it(tmp_path: Path) -> None:
    names, bits = ("mixed", "learning", "math"), [3.0, 4.0, 5.0]
    model = {"domains": dict.fromkeys(names, bits), "mixed": bits[:2], "tasks": {}}
    sizes = {"domains": dict.fromkeys(names, bits), "mixed": bits[:2]}
    write_json(tmp_path / "documents.json", {"bytes": sizes, "models": {"btx": model, "seed": model}})
    read = read_documents(tmp_path / "documents.json")
    assert read is not None
    row = compare_documents(read["models"]["btx"], read["models"]["seed"], read["bytes"], branches=["learning"])
    assert list(sets_of(row)) == ["mean", "learning", "keeping", "mixed (domain)", "learning (domain)", "math", "mixed"]
    measured = {name: {"bits_per_byte": 1.0} for name in names}
    means = {f"{name}_bits_per_byte": 1.0 for name in ("mean", "learning", "keeping")}
    table = results_table({"models": {"btx": {"domains": measured, "mixed": {"bits_per_byte": 1.0}, **means}}})
    assert table.quality_titles([]) == [*list(sets_of(row))[3:6], "mean", "learning", "keeping", "mixed"]
    assert table.meanings.startswith("; learning is the mean over the domains that have a branch, keeping over all")


def test_the_interval_is_the_normal_one_where_that_is_known():
    rng = np.random.default_rng(2)
    values = rng.normal(0.3, 1.0, 2000)
    ratios = resampled_ratios(values, np.ones(2000), 4000, 0)
    assert ratios[0] == pytest.approx(values.mean())
    low, high = np.percentile(ratios[1:], (2.5, 97.5))
    assert (low, high) == pytest.approx((values.mean() - 1.96 / 2000**0.5, values.mean() + 1.96 / 2000**0.5), abs=0.003)


def test_domains_are_drawn_apart_so_the_mean_is_surer_than_each_of_them():
    rng = np.random.default_rng(3)
    first = {"domains": {name: rng.normal(1, 1, N).tolist() for name in "abcd"}, "tasks": {}}
    second = {"domains": {name: [0.0] * N for name in "abcd"}, "tasks": {}}
    found = compare_documents(first, second, {"domains": {name: [1] * N for name in "abcd"}})
    widths = [value["high"] - value["low"] for value in found["domains"].values()]
    assert found["mean"]["high"] - found["mean"]["low"] == pytest.approx(np.mean(widths) / 2, rel=0.08)


def test_branches_domains_and_the_others_have_means_of_their_own():
    first, second, sizes = two_models(gap=0.02, noise=0.05)
    for model in (first, second, sizes):
        model["domains"]["general"] = [3 * value for value in model["domains"]["math"]]
    found = compare_documents(first, second, sizes, branches=["math", "code"])
    domains = {name: value["difference"] for name, value in found["domains"].items()}
    assert found["learning"]["difference"] == pytest.approx((domains["math"] + domains["code"]) / 2)
    assert found["keeping"] == found["domains"]["general"]
    assert found["learning"]["low"] < found["learning"]["difference"] < found["learning"]["high"]
    for branches in ([], ["math", "code", "general"]):
        assert not {"learning", "keeping"} & set(compare_documents(first, second, sizes, branches=branches))


def test_answers_that_only_one_model_gets_right_decide_a_task():
    right = np.zeros(N, int)
    better = right.copy()
    better[:20] = 1
    bits, (_, _, sizes) = np.ones(N), two_models(0, 1)
    found = compare_documents(scores(bits, better), scores(bits, right), sizes)["tasks"]["quiz"]
    assert found["difference"] == pytest.approx(0.05)
    assert found["low"] == pytest.approx(0.05 - 1.96 * (0.05 * 0.95 / N) ** 0.5, abs=0.004)
    assert found["p"] < 0.01


def test_the_same_seed_draws_the_same_and_few_draws_at_once_change_nothing(monkeypatch):
    values, sizes = np.arange(30.0), np.arange(1.0, 31.0)
    drawn = resampled_ratios(values, sizes, 200, 5)
    np.testing.assert_array_equal(drawn, resampled_ratios(values, sizes, 200, 5))
    assert not np.array_equal(drawn, resampled_ratios(values, sizes, 200, 6))
    monkeypatch.setattr("btx.reporting.paired_bootstrap.DRAWS_AT_ONCE", 70)
    np.testing.assert_allclose(drawn, resampled_ratios(values, sizes, 200, 5))


@pytest.fixture
def evaluated(tmp_path) -> Path:
    run = RunFolder.create(pico_recipe(tmp_path))
    first, second, sizes = two_models(gap=0.02, noise=0.05)
    del second["mixed"]
    (run.path / "evaluate").mkdir()
    documents = {"bytes": sizes, "models": {"seed": second, "soup": first, "btx": first}}
    (run.path / "evaluate" / "documents.json").write_text(json.dumps(documents), "utf-8")
    return run.path


def test_btx_is_compared_with_every_other_model_or_two_are_named(evaluated):
    found = compare_models(evaluated)
    assert list(found["models"]) == ["seed", "soup"]
    assert "mixed" not in found["models"]["seed"]
    assert "mixed" in found["models"]["soup"]
    turned = compare_models(evaluated, "seed", "btx")["models"]["btx"]["mean"]
    assert turned["difference"] == pytest.approx(-found["models"]["seed"]["mean"]["difference"])
    with pytest.raises(UserError, match="no results of a model 'bxt'; there are: seed, soup, btx"):
        compare_models(evaluated, "bxt")
    with pytest.raises(UserError, match="at least 100"):
        compare_models(evaluated, resamples=10)
    (evaluated / "evaluate" / "documents.json").unlink()
    with pytest.raises(RunFolderError, match="btx evaluate"):
        compare_models(evaluated)


def test_models_of_two_runs_are_compared_on_the_same_documents_only(evaluated, tmp_path):
    variant = RunFolder.create(pico_recipe(tmp_path, "variant")).path
    stranger = RunFolder.create(pico_recipe(tmp_path, "stranger", "rng_seed=1")).path
    documents = json.loads((evaluated / "evaluate" / "documents.json").read_text("utf-8"))
    for folder in (variant, stranger):
        shutil.copytree(evaluated / "evaluate", folder / "evaluate")
    found = compare_models(evaluated, "btx", other_run=variant)["models"]
    assert list(found) == ["seed", "soup", "btx"]
    assert found["btx"]["mean"]["difference"] == 0.0
    assert found["seed"] == compare_models(evaluated)["models"]["seed"]
    other_questions = compare_models(evaluated, other_run=stranger)["models"]["seed"]
    assert other_questions == found["seed"] | {"tasks": {}}
    shown = CliRunner().invoke(app, ["compare", str(evaluated), "btx", "seed", "--with", str(variant), "--json"])
    assert json.loads(shown.output)["models"] == {"seed": found["seed"]}
    documents["bytes"]["domains"]["math"][0] += 1
    (stranger / "evaluate" / "documents.json").write_text(json.dumps(documents), "utf-8")
    with pytest.raises(UserError, match="stranger were measured on different documents"):
        compare_models(evaluated, other_run=stranger)
    with pytest.raises(UserError, match="variant has no results of a model 'bxt'"):
        compare_models(evaluated, "btx", "bxt", other_run=variant)


def test_of_two_runs_a_domain_that_only_one_has_a_branch_of_is_neither_learned_nor_kept(tmp_path: Path) -> None:
    folders = [RunFolder.create(pico_recipe(tmp_path, name, f"train.domains={branches}")).path
               for name, branches in (("one", "[birds]"), ("two", "[birds,tools]"))]  # fmt: skip
    for number, folder in enumerate(folders):
        bits = {"birds": [1.0 + number, 2.0], "tools": [5.0 + 3 * number, 4.0], "general": [3.0, 4.0 + 5 * number]}
        sizes = {"domains": {name: [8.0, 8.0] for name in bits}}
        (folder / "evaluate").mkdir()
        write_json(folder / "evaluate/documents.json",
                   {"bytes": sizes, "models": {"btx": {"domains": bits, "tasks": {}}}})  # fmt: skip
    for here, there, sign in ((*folders, -1), (*folders[::-1], 1)):
        found = compare_models(here, "btx", other_run=there)["models"]["btx"]
        differences = {part: value["difference"] for part, value in found.items() if "difference" in value}
        assert differences == {part: sign * gap / 16 for part, gap in (("mean", 3), ("learning", 1), ("keeping", 5))}


def test_the_command_prints_a_table_or_json(evaluated):
    shown = CliRunner().invoke(app, ["compare", str(evaluated), "btx", "seed"])
    assert shown.exit_code == 0
    assert "btx minus the other" in shown.output
    assert "p < 0.001" in shown.output
    assert "[-0.0" in shown.output
    printed = CliRunner().invoke(app, ["compare", str(evaluated), "--json"])
    assert json.loads(printed.output) == compare_models(evaluated)
