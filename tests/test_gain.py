"""What a run gains, predicted: the law that plan goes by, the oracle gap before the finetuning."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from btx.errors import RecipeError
from btx.files import read_json, write_json, write_sealed
from btx.planning.gain import (
    CHECKED_RATIOS,
    UNCERTAIN_SHARE,
    UNCERTAINTY,
    Prediction,
    gain_notes,
    law_loss,
    law_tokens,
    uncertainty,
    usual_bytes_per_token,
)
from btx.planning.plan import plan
from btx.reporting import findings
from btx.reporting.oracle import gap_of
from btx.reporting.run_files import Run, read_run
from tests.pico_run import pico_recipe

ROWS = Path(__file__).parents[1] / "benchmarks" / "gain.json"


def test_more_experts_want_more_tokens_a_parameter() -> None:
    def crossing(params: float) -> float:
        """Tokens a parameter from which four experts have the lower loss."""
        ratio = 0.1
        while law_loss(params, ratio * params, 4) > law_loss(params, ratio * params, 1):
            ratio *= 1.01
        return ratio

    crossings = [crossing(params) for params in (4e5, 7e6, 3e7, 1e9)]
    assert crossings == sorted(crossings, reverse=True)  # larger models cross earlier
    assert law_loss(1e9, 1e12, 1) - law_loss(1e9, 1e12, 8) > law_loss(1e9, 1e12, 1) - law_loss(1e9, 1e12, 2) > 0


def test_the_law_is_the_papers() -> None:
    # E = 1: 1/Ê = 1/(0 + 1/(1/2.0732 - 1/290.4521)) + 1/290.4521 = 1/2.0732.
    log = math.log(2.0732)
    of_parameters = 35.91 * 2.0732**-0.2285 * 1e9 ** (-0.1889 + 0.0098 * log)
    of_data = 35.98 * 2.0732**0.5529 * 2e10 ** (-0.1775 - 0.0259 * log)
    assert law_loss(1e9, 2e10, 1) == pytest.approx(of_parameters + of_data + 1.3637, rel=1e-12)


def test_tokens_after_which_a_loss_is_reached_undo_the_law() -> None:
    assert law_tokens(3e6, law_loss(3e6, 5e7, 4), 4) == pytest.approx(5e7, rel=1e-9)
    assert law_tokens(3e6, 1.4, 4) == math.inf


def test_plan_predicts_from_the_tokens_a_parameter_and_warns_below_ten(tmp_path: Path) -> None:
    short, long = (
        plan(pico_recipe(tmp_path, "run", f"seed_model.train.tokens={tokens}")) for tokens in (256, 256 * 20_000)
    )
    for planned, enough in ((short, False), (long, True)):
        prediction = planned["prediction"]
        params = planned["models"]["seed"]["total_params"]
        assert prediction["tokens_per_parameter"] == prediction["seed_tokens"] / params
        assert prediction["low"] < prediction["gain"] < prediction["high"]
        assert any(note.startswith("warning: below 10 tokens a parameter") for note in planned["notes"]) != enough
    assert short["prediction"]["gain"] < 0 < long["prediction"]["gain"]


@pytest.mark.parametrize(("ratio", "said"), [
    (9.97, "9.97"), (9.9996, "9.9996"), (9.94, "9.9"), (10.04, "10.0"),
    (5.6e-14, "5.6e-14"), (0.14, "0.1"), (24.04, "24.0"), (4196.5, "4,196"), (2.8e295, "2.8e+295"),
])  # fmt: skip
def test_tokens_a_parameter_that_nobody_can_mean_are_told_by_their_size(ratio: float, said: str) -> None:
    assert gain_notes(predicted(ratio, 0.0))[0].startswith(f"the seed model has read {said} tokens a parameter (by")


def predicted(ratio: float, gain: float, share: float = 0.4) -> Prediction:
    """A prediction of 4 bytes a token."""
    return Prediction(1.0, ratio, "the recipe", gain, 0.0, 0.0, 4.0, share, 0.0)


@pytest.mark.parametrize(("ratio", "gain", "said"), [
    (6, -0.01, "below 10 tokens a parameter a mixture is expected to gain nothing over dense training, or to lose"),
    (9.97, 0.007, "below 10 tokens a parameter a mixture gained nothing over dense training in any run"),
    (14.5, -0.006, "a mixture is expected to lose to dense training here: train the seed model longer"),
    (14.5, -1e-6, ""), (30, 0.03, ""),
])  # fmt: skip
def test_the_warning_says_what_the_prediction_says(ratio: float, gain: float, said: str) -> None:
    warnings = [note for note in gain_notes(predicted(ratio, gain)) if note.startswith("warning")]
    assert [said in warning for warning in warnings] == ([True] if said else [])


def test_the_uncertainty_grows_with_the_gain_as_it_did_in_the_measured_runs() -> None:
    rows = read_json(ROWS)
    off = {row["predicted"]: row["gains"]["btx"]["mean"][0] - row["predicted"] for row in rows}
    assert all(round(uncertainty(gain), 2) == UNCERTAINTY for gain in off)
    assert all(abs(difference) < 2 * uncertainty(gain) for gain, difference in off.items())
    root_mean_square = math.sqrt(sum(difference**2 for difference in off.values()) / len(off))
    assert 1.5 * root_mean_square == pytest.approx(UNCERTAINTY, rel=0.25)
    two = sorted(off, key=abs)[-2:]
    assert math.sqrt(sum((off[gain] / gain) ** 2 for gain in two) / 2) == pytest.approx(UNCERTAIN_SHARE, abs=0.05)
    assert uncertainty(-0.7) > 0.25
    assert "± 0.26 bits per byte" in gain_notes(predicted(1.5, -0.7))[0]


def test_what_the_law_was_not_checked_on_is_said() -> None:
    ratios = [row["tokens_per_parameter"] for row in read_json(ROWS)]
    assert (min(ratios), max(ratios)) == pytest.approx(CHECKED_RATIOS, rel=1e-3)
    assert [
        "far outside the runs it was checked on" in gain_notes(predicted(*numbers))[0]
        for numbers in ((1.4, 0, 0.4), (48, 0, 1.04), (0.4, 0, 0.4), (15_000, 0, 0.4), (24, 0, 0.01), (24, 0, 1e9))
    ] == [False, False, True, True, True, True]


def test_a_small_vocabulary_has_fewer_bytes_a_token() -> None:
    sizes = [256, 320, 2048, 32_768, 151_936]
    assert [usual_bytes_per_token({"vocab_size": size}) for size in sizes] == pytest.approx(
        [1.2, 1.33, 2.4, 4.0, 4.0], abs=0.01
    )
    assert (usual_bytes_per_token({"vocab_size": 3}), usual_bytes_per_token({})) == (1.0, 4.0)


@pytest.mark.parametrize("tokens", ["1e-320", "0.5", "0", ".inf"])
def test_fewer_tokens_than_one_are_refused(tmp_path: Path, tokens: str) -> None:
    with pytest.raises(RecipeError, match=r"seed_model\.pretrained_tokens: must be"):
        pico_recipe(tmp_path, "run", "seed_model={path: model}", f"seed_model.pretrained_tokens={tokens}")


def test_plan_says_what_a_phase_in_proportion_would_gain(tmp_path: Path) -> None:
    few, many = (
        plan(pico_recipe(tmp_path, "run", "seed_model.train.tokens=5120000", f"finetune.tokens={tokens}"))
        for tokens in (25_600, 1_280_000)
    )
    told, nothing = (
        [note for note in planned["notes"] if "the training after the seed model is" in note] for planned in (few, many)
    )
    assert (len(told), nothing) == (1, [])
    few, many = few["prediction"], many["prediction"]
    assert few["phase_share"] < 0.1 < many["phase_share"]
    assert few["gain_in_proportion"] == many["gain_in_proportion"]
    assert few["gain"] < many["gain"] < few["gain_in_proportion"] * many["phase_share"] * 3 * 1.5
    assert f"were it a third, the law would say {few['gain_in_proportion']:+.3f}" in told[0]


def test_the_oracle_is_the_best_model_of_each_domain_and_divergence_is_what_was_won_at_home() -> None:
    told = gap_of({
        "seed": {"math": 2.0, "code": 1.0, "general": 1.5}, "expert/math": {"math": 1.5, "code": 1.3, "general": 1.7},
        "expert/code": {"math": 2.2, "code": 0.9, "general": 1.6}, "mix": {"math": 1.7, "code": 0.9, "general": 1.4},
    })  # fmt: skip
    assert {domain: facts["best"] for domain, facts in told["domains"].items()} == {
        "math": "expert/math", "code": "expert/code", "general": "seed"
    }  # fmt: skip
    assert [facts["gap"] for facts in told["domains"].values()] == pytest.approx([0.2, 0.0, -0.1])
    assert told["mean_gap"] == pytest.approx(0.1 / 3)
    assert told["divergence"] == pytest.approx({"math": 25.0, "code": 10.0})
    assert told["predicted_gain"] == pytest.approx(0.82 * 17.5 - 2.72)


def finished(tmp_path: Path, models: dict[str, object]) -> Run:
    write_json(tmp_path / "evaluate" / "results.json", {"models": models})
    write_json(tmp_path / "mix" / "oracle.json", gap_of({
        "seed": {"math": 2.0}, "expert/math": {"math": 1.5}, "mix": {"math": 1.7}
    }))  # fmt: skip
    return read_run(tmp_path)


def test_the_report_shows_the_prediction_beside_what_came_out(tmp_path: Path) -> None:
    gain = {"tokens_per_parameter": 30.5, "gain": 0.015, "low": -0.005, "high": 0.035}
    btx = {"mean_bits_per_byte": 1.729, "predicted_gain": gain}
    alone = findings.predicted(finished(tmp_path, {"btx": btx}))
    assert alone.endswith("between -0.005 and +0.035; no dense baseline was trained to compare with.")
    both = findings.predicted(finished(tmp_path, {"btx": btx, "dense_cm": {"mean_bits_per_byte": 1.772}}))
    assert both.startswith("At 30.5 tokens a parameter")
    few = btx | {"predicted_gain": gain | {"tokens_per_parameter": 0.0015}}
    assert findings.predicted(finished(tmp_path, {"btx": few})).startswith("At 0.0015 tokens a parameter")
    assert both.endswith("against dense_cm it is +0.043.")
    other = findings.predicted(finished(tmp_path, {"btx": btx, "dense_dm": {"mean_bits_per_byte": 1.772}}))
    assert other.endswith("against dense_dm, which had the same data and other FLOPs, it is +0.043.")
    late = btx | {"predicted_gain": gain | {"made_before": None}}
    said = findings.predicted(finished(tmp_path, {"btx": late}))
    assert "of the seed model the law says, asked only after the training, a gain of +0.015" in said
    run = finished(tmp_path, {
        name: {"mean_bits_per_byte": (a + b) / 2, "predicted_gain": gain,
               "domains": {"math": {"bits_per_byte": a}, "general": {"bits_per_byte": b}}}
        for name, a, b in (("btx", 1.5, 2.0), ("dense_cm", 1.25, 2.5))
    })  # fmt: skip
    run.recipe["train"] = {"domains": ["math"]}
    assert findings.predicted(run).endswith("against dense_cm it is +0.125 (learning -0.250, keeping +0.500).")
    assert findings.predicted(finished(tmp_path, {"btx": {"mean_bits_per_byte": 1.7}})) == ""
    told = finished(tmp_path, {"btx": {"mean_bits_per_byte": 1.8}, "expert/math": {"mean_bits_per_byte": 2.0}})
    assert findings.oracle(told).endswith("(arXiv 2603.22755); after it btx needs 10.0 % fewer bits than expert/math.")
    said = findings.oracle(finished(tmp_path, {}))
    assert said.endswith("over the best single expert (arXiv 2603.22755).")
    assert said.startswith(
        "Before the finetuning the mix was 0.200 bits per byte behind each domain's best model; experts needed 25.0 %"
    )


@pytest.mark.parametrize(("begun_for", "is_told"), [("as it was", True), ("another text", False), (None, True)])
def test_a_gap_on_text_that_has_changed_since_is_not_told(tmp_path: Path, begun_for: str | None, is_told: bool) -> None:
    gap = gap_of({"seed": {"math": 2.0}, "expert/math": {"math": 1.5}, "mix": {"math": 1.7}})
    write_json(tmp_path / "mix" / "oracle.json", gap | {"text": {"math": "as it was"}})
    if begun_for is not None:
        write_sealed(tmp_path / "data" / "math" / "started.json", {"inputs": begun_for, "settings": {}})
    assert bool(read_run(tmp_path).oracle) == is_told


def test_once_a_run_is_evaluated_the_gap_is_the_one_of_its_results(tmp_path: Path) -> None:
    bits = {"seed": 2.5, "expert/math": 1.25, "soup": 1.0, "mix": 1.75, "btx": 1.125}
    run = finished(tmp_path, {name: {"domains": {"math": {"bits_per_byte": value}}} for name, value in bits.items()})
    assert run.oracle["domains"] == {"math": {"best": "expert/math", "best_bits": 1.25, "mix_bits": 1.75, "gap": 0.5}}
    assert run.oracle["divergence"] == {"math": 50.0}
