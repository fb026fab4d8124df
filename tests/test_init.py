"""`btx init` writes a recipe that can be planned as it is, for a model and texts of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from btx.cli.init import init, recipe_text
from btx.errors import BtxError, UserError
from btx.planning.data_look import look_into_data
from btx.recipe.loading import copy_recipe, load_recipe, packaged_recipes, parse_recipe
from btx.run_folder.folder import RunFolder
from btx.running.preflight import preflight
from tests.conftest import pico_texts


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with three folders of text."""
    monkeypatch.chdir(tmp_path)
    for name, key in (("law", "text"), ("code", "content"), ("general", "text")):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"id": i, key: text}) for i, text in enumerate(pico_texts() * 20)]
        (tmp_path / name / "a.jsonl").write_text("\n".join(lines), "utf-8")
    return tmp_path


def test_the_recipe_of_a_model_and_folders_can_be_planned_as_it_is(here: Path, make_llama: Callable[..., Path]) -> None:
    make_llama("model")
    init(Path("mine.yaml"), model="model", domain=["law=./law", "code=./code/*.jsonl"], general="./general")
    recipe = load_recipe("mine.yaml")
    preflight(recipe)
    rows = look_into_data(RunFolder(Path(recipe.run_folder), recipe))
    assert [row["domain"] for row in rows] == ["law", "code", "general"]
    assert (recipe.name, recipe.device, recipe.train.domains) == ("mine", "auto", ["law", "code"])
    assert recipe.data.domains["code"].sources[0].text == "content"  # the column that was found
    assert recipe.data.sequence_length == 128  # what the model can read
    assert recipe.train.tokens == 50_000  # about once through 205 kB of text, to one digit
    assert recipe.train.batch_tokens < 1000
    text = Path("mine.yaml").read_text("utf-8")
    assert text.count("#") > 20
    with pytest.raises(UserError, match="exists already"):
        init(Path("mine.yaml"))


def test_where_the_card_is_silent_the_recipe_has_a_line_for_the_tokens_read(
    here: Path, make_llama: Callable[..., Path]
) -> None:
    model = make_llama("model")
    for card, is_asked in ((None, True), ("A model.", True), ("Trained on 2,000,000 tokens.", False)):
        if card is not None:
            (model / "README.md").write_text(card, "utf-8")
        text, _ = recipe_text(Path("my.yaml"), "model", {"law": "law"}, None)
        assert ("  # pretrained_tokens: " in text) == is_asked
        said = parse_recipe(text.replace("# pretrained_tokens", "pretrained_tokens"), "my.yaml").seed_model
        assert said.pretrained_tokens == (15e12 if is_asked else None)
    assert "pretrained_tokens" not in recipe_text(Path("my.yaml"), "hf:org/name", {"law": "law"}, None)[0]


def test_without_general_text_all_domains_are_it(here: Path, make_llama: Callable[..., Path]) -> None:
    make_llama("model")
    init(Path("mine.yaml"), model="model", domain=["law=law", "code=code"])
    recipe = load_recipe("mine.yaml")
    preflight(recipe)
    assert [source.domain for source in recipe.data.domains["general"].sources] == ["law", "code"]


@pytest.mark.parametrize("longest", [True, -1, "many", None])
def test_names_that_look_like_numbers_and_configs_that_say_nothing_are_taken(here: Path, longest: object) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps({"max_position_embeddings": longest}))
    init(Path("mine.yaml"), model="model", domain=["1984=law", "true=code"])
    recipe = load_recipe("mine.yaml")
    assert (recipe.train.domains, recipe.data.sequence_length) == (["1984", "true"], 2048)


def test_what_is_no_models_folder_is_told_at_once(
    here: Path, make_llama: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_llama("model")
    init(Path("mine.yaml"), model="model/config.json", domain=["law=law"])
    assert "seed_model.path: model/config.json: a model is a folder" in capsys.readouterr().err
    init(Path("other.yaml"), model="~nobody-here/model", domain=["law=law"])
    assert "seed_model.path: ~nobody-here/model: there is no such folder yet" in capsys.readouterr().err


def test_a_template_names_folders_that_are_refused_until_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    init(Path("my.yaml"))
    assert "seed_model.path: ./model: there is no such folder yet" in capsys.readouterr().err
    with pytest.raises(BtxError, match=r"data\.domains\.law: .*law: no such file or folder"):
        preflight(load_recipe("my.yaml"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": Path("my.txt")}, "ends in .yaml"),
        ({"target": Path("no/my.yaml")}, "there is no folder"),
        ({"domain": ["law"]}, "write NAME=PATH"),
        ({"domain": ["a b=./x"]}, "a b"),
        ({"domain": ["general=./x"], "general": "./y"}, "name the same domain"),
        ({"target": Path("-.yaml")}, "name"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BtxError, match=message):
        init(**given)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_copied_recipe_takes_a_gpu_where_there_is_one(tmp_path: Path, name: str) -> None:
    copy_recipe(name, tmp_path / "mine.yaml")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    large = "cuda" if recipe.seed_model.plan_config else "auto"  # an existing model, too large for a CPU
    assert recipe.device == {"results": "cpu", "gain": "cpu"}.get(name, large)  # docs/results.md was measured on CPUs
