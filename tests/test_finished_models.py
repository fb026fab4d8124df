"""Which model is meant by the run's model: the last finished one of the recipe as it is now, and what is said of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from btx.cli import out
from btx.cli import serve as cli_serve
from btx.errors import NotYet, RunFolderError
from btx.run_folder.finished_models import finished_models, last_model
from btx.run_folder.folder import RunFolder
from tests.pico_models import mixtral
from tests.pico_run import as_finished, pico_recipe

SFT = "align.sft.data=[chat.jsonl]"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with SFT whose mix is finished."""
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": "the heron", "completion": "sings"}) + "\n")
    run = RunFolder.create(pico_recipe(tmp_path, "run", SFT))
    as_finished(run, "seed", "mix")
    return run


def changed(run: RunFolder, before: str, after: str) -> RunFolder:
    """The run after somebody has edited its recipe."""
    text = (run.path / "recipe.yaml").read_text("utf-8")
    assert before in text
    (run.path / "recipe.yaml").write_text(text.replace(before, after), "utf-8")
    return RunFolder.open(run.path)


def test_the_last_finished_of_mix_finetune_and_align_is_the_runs_model_and_it_is_said(run: RunFolder) -> None:
    told: list[str] = []
    assert last_model(run, told.append).folder == run.path / "mix" / "model"
    as_finished(run, "finetune")
    (run.path / "align" / "sft" / "model").mkdir(parents=True)  # begun: no done.json
    assert last_model(run, told.append).name == "btx"
    as_finished(run, "align/sft")
    assert last_model(run, told.append).name == "sft"
    assert told == [
        f"{run.path}: the model of mix (finetune, align/sft: not finished yet)",
        f"{run.path}: the model of finetune (align/sft: not finished yet)",
        f"{run.path}: the model of align/sft",
    ]
    assert [model.name for model in finished_models(run)] == ["seed", "mix", "btx", "sft"]


def test_a_folder_of_a_stage_that_the_recipe_has_no_more_is_not_the_runs_model(run: RunFolder, tmp_path: Path) -> None:
    as_finished(run, "finetune", "align/sft")
    assert last_model(RunFolder(run.path, pico_recipe(tmp_path)), lambda line: None).stage == "finetune"


def test_a_run_without_a_mixed_model_has_none(run: RunFolder) -> None:
    shutil.rmtree(run.path / "mix")
    with pytest.raises(NotYet, match="no mixed model of this run is finished yet"):
        last_model(run, lambda line: None)


def test_a_stale_model_is_talked_to_with_a_warning_and_given_to_nobody(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run.path / "seed")
    for stage in ("mix", "finetune"):
        mixtral(run.path / stage / "model")
        as_finished(run, stage)
    run = changed(run, "learning_rate: 0.001", "learning_rate: 0.002")
    why = "finetune is stale (finetune.learning_rate: 0.001 → 0.002)"
    served = cli_serve._served(run.path)
    assert list(served) == ["btx", "mix"]
    assert f"warning: {why}; `btx run {run.path}` makes it anew" in capsys.readouterr().err
    cli_serve.chat(run.path, prompt="the", max_new_tokens=1, as_json=True)
    told = capsys.readouterr()
    assert json.loads(told.out)["tokens"]
    assert why in told.err
    for give in (lambda: out.export(run.path, out.Format.gguf, dry_run=True),
                 lambda: out.push(run.path, "org/moe", dry_run=True)):  # fmt: skip
        with pytest.raises(RunFolderError, match=r"is stale .* name its folder: .*finetune/model"):
            give()
    out.export(run.path / "finetune" / "model", out.Format.gguf, dry_run=True)
