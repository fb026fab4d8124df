"""What is predicted of a run is written down before it is trained, and told by its results as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from btx.errors import CheckpointError
from btx.files import read_json
from btx.planning import gain, kept_prediction
from btx.planning.kept_prediction import keep_prediction, prediction_of
from btx.planning.plan import plan
from btx.run_folder.folder import RunFolder
from btx.run_folder.stages_of_recipe import build_graph
from tests.pico_models import llama
from tests.pico_run import pico_recipe, run_here


def test_a_prediction_stands_beside_the_seed_model_and_only_another_recipe_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pico_recipe(tmp_path)
    run, lines = run_here(recipe, ["data", "seed"])
    assert sum("predicted gain over dense training" in line for line in lines) == 1
    assert any(line.startswith("warning: below 10 tokens a parameter") for line in lines)
    written = read_json(run.folder("seed") / "prediction.json")["prediction"]
    assert written == plan(recipe)["prediction"]
    monkeypatch.setattr(gain, "bytes_per_token_of", lambda run: 99.0)  # with more data it would be another number
    again = RunFolder(run.path, pico_recipe(tmp_path, "run", "evaluate.tokens=400"))
    assert prediction_of(again) == written | {"made_before": "seed"}
    keep_prediction(again, "finetune", lines.append)
    assert not (run.folder("finetune") / "prediction.json").exists()

    longer = RunFolder(run.path, pico_recipe(tmp_path, "run", "finetune.tokens=512000"))
    late = prediction_of(longer)
    assert late is not None
    assert (late["made_before"], late["bytes_per_token"]) == (None, 99.0)
    keep_prediction(longer, "finetune", lines.append)
    assert prediction_of(longer) == late | {"made_before": "finetune"}
    assert read_json(run.folder("seed") / "prediction.json")["prediction"] == written
    assert sum("predicted gain over dense training" in line for line in lines) == 2


def test_an_existing_seed_model_has_one_too_and_where_nobody_says_what_it_read_that_is_kept(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", 0)
    overrides = [f"seed_model={{path: '{model}'}}", "data.sequence_length=32"]
    run, lines = run_here(pico_recipe(tmp_path, "run", *overrides), ["data", "seed"])
    assert any("seed_model.pretrained_tokens does" in line for line in lines)
    assert prediction_of(run) is None
    said = RunFolder(run.path, pico_recipe(tmp_path, "run", *overrides, "seed_model.pretrained_tokens=2e9"))
    told = prediction_of(said)
    assert told is not None
    assert (told["seed_tokens"], told["made_before"]) == (2e9, None)


def test_the_tokens_that_a_seed_model_has_read_make_the_results_anew_and_nothing_else(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", 0)
    unsaid, few, many = (
        {stage.name: stage.inputs for stage in build_graph(pico_recipe(
            tmp_path, "run", f"seed_model={{path: '{model}'{tokens}}}", "data.sequence_length=32"))}
        for tokens in ("", ", pretrained_tokens: 1e9", ", pretrained_tokens: 2e9")
    )  # fmt: skip
    for one, other in ((unsaid, few), (few, many)):
        assert {name for name in one if one[name] != other[name]} == {"evaluate", "report"}


def test_a_training_goes_on_where_nothing_can_be_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: RunFolder) -> None:
        raise CheckpointError("no such model")

    monkeypatch.setattr(kept_prediction, "dense_config", fails)
    lines: list[str] = []
    run = RunFolder(tmp_path / "run", pico_recipe(tmp_path))
    keep_prediction(run, "train/math", lines.append)
    assert lines == []
    keep_prediction(run, "seed", lines.append)
    assert lines == ["warning: the gain over dense training is not predicted: no such model"]
