"""Why a stage is stale is told in words, with the keys a recipe has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from btx.run_folder.differences import changed_settings
from btx.run_folder.graph import Graph
from btx.run_folder.stages_of_recipe import build_graph
from tests.pico_run import pico_recipe

BASELINES = "baselines=[soup,dense_dm,upcycling_cm,btm_top2,btx_sample_top1]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pico")


@pytest.fixture(scope="module")
def before(folder: Path) -> Graph:
    return build_graph(pico_recipe(folder, "run", BASELINES))


def reasons(before: Graph, folder: Path, overrides: list[str]) -> dict[str, list[str]]:
    """Stage whose settings changed → what is told of it."""
    after = build_graph(pico_recipe(folder, "run", BASELINES, *overrides))
    return {
        stage.name: changed_settings(stage.name, before[stage.name].shown, stage.shown)
        for stage in after if stage.settings != before[stage.name].settings
    }  # fmt: skip


CHANGES = {
    "seed_model.tokenizer.vocab_size=330": ("data/tokenizer", "seed_model.tokenizer.vocab_size: 320 → 330"),
    "data.domains.birds={path: birds.jsonl, max_bytes: 1000}": (
        "data/birds", "data.domains.birds.sources.0.max_bytes: not set → 1000"),
    "data.domains.birds=[birds.jsonl,{path: tools.jsonl, weight: 2}]": (
        "train/birds", "the text it reads: 90 % birds, 10 % general → 30 % birds, 60 % birds/1, 10 % general"),
    "data.held_out=0.1": ("data/tools", "data.held_out: 0.05 → 0.1"),
    "data.sequence_length=64": ("baselines/dense_dm", "data.sequence_length: 32 → 64"),
    "train.replay=0.2": ("train/tools", "train.replay: 0.1 → 0.2"),
    "train.domains=[birds]": ("mix", "the experts: birds, tools, generalist → birds, generalist"),
    "mix.generalist=false": ("baselines/soup", "mix.generalist: true → false"),
    "mix.router=switch": ("baselines/upcycled", "mix.router: top_k → switch"),
    "mix.dtype=bfloat16": ("mix", "mix.dtype: not set → bfloat16"),
    "finetune.mixture={birds: 1, tools: 2}": ("finetune", "finetune.mixture: added"),
    "finetune.load_balancing=0": ("baselines/btx_sample_top1", "finetune.load_balancing: 0.01 → 0"),
    "baseline_training={dense_dm: {learning_rate: 1e-3}}": ("baselines/dense_dm_domains",
                                                            "train.learning_rate: 0.002 → 0.001"),
    "evaluate.mixed=5": ("evaluate", "evaluate.mixed.documents: 0 → 5"),
    "data.general=birds": ("seed", "the text it reads: general → birds"),
    "rng_seed=4": ("analyze", "rng_seed: 3 → 4"),
}  # fmt: skip


@pytest.mark.parametrize("override", CHANGES)
def test_every_stage_that_changed_says_why_in_words(before: Graph, folder: Path, override: str) -> None:
    told = reasons(before, folder, [override])
    stage, expected = CHANGES[override]
    assert told[stage] == [expected]
    for lines in told.values():
        assert lines
        for line in lines:
            assert not re.search(r"[\[\]{}']|None|True|False|[0-9a-f]{32}", line), line
