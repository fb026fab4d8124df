"""What decides a result keeps its hash from version to version, or every user's finished runs count as stale.

A new field of the recipe leaves all hashes as they are, if its default means what was there before. If a hash changes
because results really do, write the golden file anew and say so in CHANGELOG.md: `python -m tests.test_golden_hashes`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from btx.recipe.evaluate import Analyze, Evaluate
from btx.recipe.mix import Mix
from btx.recipe.section import Section
from btx.recipe.training import BaselineTraining, Finetune, Lora, SeedModel, SeedTraining, TokenizerTraining, Train
from btx.run_folder import decisive as decisive_module
from btx.run_folder.decisive import SPEED_ONLY, decisive, neutral_value, shown
from btx.run_folder.graph import Stage
from btx.run_folder.stage_notes import started_json
from btx.run_folder.stages_of_recipe import build_graph
from tests.pico_run import pico_recipe

GOLDEN = Path(__file__).with_name("golden_hashes.json")
SECTIONS: list[type[BaseModel]] = [
    SeedModel, TokenizerTraining, SeedTraining, Train, Lora, Mix, Finetune, BaselineTraining, Evaluate, Analyze
]  # fmt: skip
ALL = "soup,dense_dm,dense_cm,upcycling_dm,upcycling_cm,btm_top1,btm_top2,btx_sample_top1,btx_no_balancing"
VARIANTS: dict[str, list[str]] = {
    "pico": [],
    "all baselines": [f"baselines=[{ALL}]"],
    "other values": ["train.replay=0.2", "mix.top_k=1", "finetune.load_balancing=0", "finetune.switching=0.25",
                     "evaluate.tokens=400", "train.domain_tokens.tools=2304", "baselines=[]"],
}  # fmt: skip


def now() -> dict[str, Any]:
    """Hashes of fixed recipes over fixed files, and the neutral value of every field that is in them."""
    with tempfile.TemporaryDirectory() as folder:
        hashes = {
            variant: {stage.name: stage.inputs for stage in build_graph(pico_recipe(Path(folder), "run", *overrides))}
            for variant, overrides in VARIANTS.items()
        }
    neutral = {
        f"{section.__name__}.{field}": shown(neutral_value(section, field))
        for section in SECTIONS for field, about in section.model_fields.items()
        if not about.is_required() and field not in SPEED_ONLY
    }  # fmt: skip
    return {"hashes": hashes, "neutral": neutral}


def test_fixed_recipes_have_their_golden_hashes() -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))["hashes"]
    assert now()["hashes"] == golden, "finished runs of every user would be stale: see the top of this file"


def test_no_field_has_another_neutral_value_than_it_had() -> None:
    golden, found = json.loads(GOLDEN.read_text("utf-8"))["neutral"], now()["neutral"]
    changed = {field: (value, found.get(field)) for field, value in golden.items() if found.get(field, value) != value}
    assert not changed, f"a default changed: put its old value into NEUTRAL in run_folder/decisive.py: {changed}"


class Younger(Mix):
    """A later version's section."""

    __name__: ClassVar[str] = "Mix"
    sparkle: float = 0.5
    """A field that nobody has used yet."""


def test_a_younger_field_with_its_default_changes_no_hash() -> None:
    assert decisive(Younger(top_k=1)) == decisive(Mix(top_k=1)) == {"top_k": 1}
    assert decisive(Younger(sparkle=0.6)) == {"sparkle": 0.6}
    assert shown(Younger())["sparkle"] == 0.5


def test_a_default_that_changed_keeps_its_old_neutral_value(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(Section):
        top_k: int = 3

    monkeypatch.setitem(decisive_module.NEUTRAL, ("Later", "top_k"), 2)
    assert decisive(Later()) == {"top_k": 3}  # the new default is another setting than the old one was
    assert decisive(Later(top_k=2)) == {}


def test_float32_that_an_earlier_version_left_out_stays_left_out_and_auto_takes_what_was_made(tmp_path: Path) -> None:
    def stage(*overrides: str, begun: dict[str, Any] | None = None) -> Stage:
        graph = build_graph(pico_recipe(tmp_path, "run", *overrides), begun=lambda name: begun)
        return graph["train/birds"]

    by_default = stage()
    noted = started_json(by_default)
    assert noted["shown"]["train"]["precision"] == "auto"
    earlier = noted | {"shown": noted["shown"] | {"train": noted["shown"]["train"] | {"precision": "float32"}}}
    float32 = "train.precision=float32"
    assert stage(begun=earlier).settings == stage(float32, begun=earlier).settings == by_default.settings
    assert stage("train.precision=bfloat16", begun=earlier).settings != by_default.settings
    asked = stage(float32, begun=noted)
    assert asked.settings != by_default.settings, "what auto made may be bfloat16"
    assert asked.settings == stage(float32).settings == stage(float32, begun=started_json(asked)).settings


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(now(), indent=1, sort_keys=True) + "\n", "utf-8")
