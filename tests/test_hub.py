"""A model's name that is no folder here is refused at once, or asked of the hub once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from btx.errors import CheckpointError
from btx.model_files import hub
from btx.model_files.model_folder import check_model
from btx.recipe.loading import parse_recipe
from btx.running.preflight import preflight

RECIPE = """\
data: {domains: {law: {generate: math}, general: {generate: general}}}
train: {domains: [law], tokens: 100_000}
finetune: {tokens: 100_000}
"""


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names that the hub was asked for; there is no network."""
    names: list[str] = []

    def unreachable(self: Any, name: str, **given: Any) -> None:
        names.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    hub._why_not.cache_clear()
    return names


@pytest.mark.parametrize(
    "path", ["my-model", "./my-model", "/data/models/my", "~/my", "~nobody-here/my", "a/b/c", "../a", "org/", "/x"]
)
def test_what_cannot_be_a_hub_name_is_refused_without_asking(path: str, asked: list[str]) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder here"):
        check_model(path)
    with pytest.raises(CheckpointError, match=r"^seed_model.path: .*: there is no such folder here"):
        preflight(parse_recipe(f"seed_model: {{path: {path!r}}}\n{RECIPE}", "my.yaml"))
    assert asked == []


def test_without_a_network_the_hub_is_asked_once(asked: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"the hub cannot be reached \(Name or service not known\)"):
            check_model("org/model")
    assert asked == ["org/model"]


def test_what_was_downloaded_before_is_used_without_a_network(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *given, **more: "config.json")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert check_model("org/model") is None
    assert constants.HF_HUB_OFFLINE
    hub._why_not.cache_clear()
    assert check_model("org/model") is None  # offline from now on
    assert asked == ["org/model"]


def test_offline_nothing_is_asked_and_the_models_nearby_are_named(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"models there: models/mine, and as .* HF_HUB_OFFLINE is set"):
        check_model("models/mien")
    assert asked == []
