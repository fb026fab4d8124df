"""Several rng seeds: means, standard errors, and differences paired run by run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from btx.errors import RunFolderError
from btx.evaluation.aggregate import aggregate, read_results

EXAMPLE = {"prompt": "1", "output": "2", "gold": "2", "correct": True}


def entry(math: float, score: float, hours: float) -> dict[str, Any]:
    return {
        "domains": {"math": {"bits_per_byte": math, "stderr": 0.01, "tokens": 100, "bytes": 300}},
        "mixed": {"bits_per_byte": math + 1, "stderr": None, "tokens": 10, "bytes": 30},
        "tasks": {"quiz": {"exact_match": score, "stderr": 0.1, "questions": 9, "examples": [EXAMPLE]}},
        "mean_bits_per_byte": math, "flops": 1e9, "hours": hours,
    }  # fmt: skip


def runs() -> list[dict[str, Any]]:
    """Runs differ by far more than their models do: only a paired difference can tell the models apart."""
    return [
        {"models": {"seed": entry(start + 0.1, 0.25, 1.0), "btx": entry(start, 0.5, 2.0)}} for start in (1.0, 2.0, 4.5)
    ]


def test_every_number_gets_its_mean_and_the_standard_error_over_runs():
    found = aggregate(runs())
    assert found["runs"] == 3
    btx = found["models"]["btx"]
    assert btx["domains"]["math"]["bits_per_byte"] == {
        "mean": pytest.approx(2.5), "stderr": pytest.approx((6.5 / 2 / 3) ** 0.5), "n": 3, "values": [1.0, 2.0, 4.5],
    }  # fmt: skip
    assert btx["mixed"]["bits_per_byte"]["mean"] == pytest.approx(3.5)
    assert btx["tasks"]["quiz"]["exact_match"]["mean"] == 0.5
    assert btx["hours"] == {"mean": 2.0, "stderr": 0.0, "n": 3, "values": [2.0, 2.0, 2.0]}
    assert "examples" not in btx["tasks"]["quiz"]
    assert "stderr" not in btx["mixed"], "no run has one"


def test_differences_to_btx_are_paired_so_what_the_runs_share_cancels():
    found = aggregate(runs())["models"]
    difference = found["seed"]["difference_to_btx"]
    assert difference["mean_bits_per_byte"]["mean"] == pytest.approx(0.1)
    assert difference["mean_bits_per_byte"]["stderr"] == pytest.approx(0.0, abs=1e-12)
    assert found["seed"]["mean_bits_per_byte"]["stderr"] > 1
    assert difference["domains"]["math"].keys() == {"bits_per_byte"}
    assert difference["tasks"]["quiz"]["exact_match"]["values"] == [-0.25, -0.25, -0.25]
    assert difference.keys() == {"domains", "mixed", "tasks", "mean_bits_per_byte"}
    assert "difference_to_btx" not in found["btx"]


def test_a_model_missing_in_a_run_is_averaged_over_the_others_and_one_run_has_no_error():
    several = runs()
    del several[0]["models"]["seed"], several[1]["models"]["btx"]
    found = aggregate(several)["models"]
    assert found["seed"]["mean_bits_per_byte"]["values"] == pytest.approx([2.1, 4.6])
    assert found["seed"]["difference_to_btx"]["mean_bits_per_byte"]["values"] == pytest.approx([0.1])
    assert found["seed"]["difference_to_btx"]["mean_bits_per_byte"]["stderr"] is None
    with pytest.raises(ValueError, match="one run at least"):
        aggregate([])


def test_results_are_read_from_run_folders_and_an_unfinished_run_is_named(tmp_path):
    for number, result in enumerate(runs()):
        (tmp_path / str(number) / "evaluate").mkdir(parents=True)
        (tmp_path / str(number) / "evaluate" / "results.json").write_text(json.dumps(result), "utf-8")
    assert read_results([tmp_path / "2", tmp_path / "0"]) == [runs()[2], runs()[0]]
    with pytest.raises(RunFolderError, match=r"3/evaluate/results.json: no results; .*btx evaluate"):
        read_results([tmp_path / "3"])
