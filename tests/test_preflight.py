"""What a run needs and can be known before it trains: context length, task files, disk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from btx.choices.families import FAMILIES, context_length, refuse_longer_sequences
from btx.choices.families.context import DEFAULTS
from btx.cli.tables import plan_tables
from btx.data.json_lines import json_objects, pieces
from btx.errors import CheckpointError, DataError, RecipeError, RunFolderError, UserError
from btx.evaluation.harness_files import requests_of
from btx.evaluation.questions import read_questions
from btx.planning import disk
from btx.planning.plan import plan
from btx.running.preflight import preflight
from btx.sweeps.variants import combinations
from tests.pico_run import pico_recipe, run_here

YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(("config", "length"), [
    ({"max_position_embeddings": 128}, 128),
    ({"n_positions": 1024}, 1024),
    ({"model_type": "qwen2"}, 32_768),
    ({"model_type": "llama", "max_position_embeddings": None}, 2048),
    ({"model_type": "no such"}, None),
    ({"max_position_embeddings": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 128),
    ({"max_position_embeddings": 128, "rope_scaling": {"type": "linear", "factor": 2}}, 256),
    ({"max_position_embeddings": 128, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 256),
    ({"max_position_embeddings": 128, "rope_parameters": YARN}, 512),
    ({"max_position_embeddings": 512, "rope_parameters": YARN | {"original_max_position_embeddings": 128}}, 512),
    ({"max_position_embeddings": 512, "rope_parameters": {"full_attention": YARN}}, 2048),
    ({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "llama3", "factor": 8}}, 512),
    ({"max_position_embeddings": 512, "rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, 512),
    ({"max_position_embeddings": 512, "rope_scaling": None, "rope_parameters": "?"}, 512),
])  # fmt: skip
def test_a_config_says_how_much_its_model_reads_at_once(config: dict[str, Any], length: int | None) -> None:
    found = context_length(config)
    assert (found and found[0]) == length
    if length is not None:
        refuse_longer_sequences(config, length, "here")
        with pytest.raises(RecipeError, match=rf"sequence_length is {length + 1:,}, .* reads {length:,} tokens"):
            refuse_longer_sequences(config, length + 1, "here")


def test_the_defaults_of_the_families_classes_are_those_of_transformers() -> None:
    from transformers import AutoConfig

    types = {family.dense for family in FAMILIES}
    assert {name: AutoConfig.for_model(name).max_position_embeddings for name in types} == DEFAULTS


def test_a_run_is_refused_longer_sequences_also_once_its_seed_model_is_there(tmp_path: Path) -> None:
    run_here(pico_recipe(tmp_path, "run"), ["data", "seed"])
    path = tmp_path / "run" / "seed" / "model"
    for run in ("run", "another"):
        own = [f"seed_model.path={path}", "seed_model.config=null", "seed_model.train=null"]
        preflight(pico_recipe(tmp_path, run, "data.sequence_length=64", *own))
        with pytest.raises(RecipeError, match=r"reads 64 tokens at once .*config\.json"):
            preflight(pico_recipe(tmp_path, run, "data.sequence_length=65", *own))
    own[0] = f"seed_model.path={path}l"
    with pytest.raises(CheckpointError, match="modell: there is no such folder here"):
        preflight(pico_recipe(tmp_path, "run", *own))


@pytest.mark.parametrize(("lines", "message"), [
    (['{"prompt": "a", "answer": "b"}', '{"prompt": "\\ud83d", "answer": "b"}'], r"q\.jsonl:2: 'prompt' is not valid"),
    (['{"prompt": "a", "answer": "\\udc00"}'], r"q\.jsonl:1: 'answer' is not valid Unicode"),
    (['{"question": "a", "answer": "b"}'], r"q\.jsonl:1: 'prompt' should hold"),
    (['{"prompt": "a", "answer": "b"}', "", "{"], r"q\.jsonl:3: not JSON"),
    (["[1]"], r"q\.jsonl:1: a question is a JSON object"),
    ([], r"q\.jsonl: no questions"),
])  # fmt: skip
def test_a_broken_task_file_is_refused_before_anything_runs(tmp_path: Path, lines: list[str], message: str) -> None:
    recipe = pico_recipe(tmp_path, "run", "evaluate.tasks.quiz.path=q.jsonl")
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"evaluate\.tasks\.quiz: .*" + message):
        preflight(recipe)


def test_half_characters_count_only_where_they_are_used(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "run", "evaluate.tasks.quiz.path=q.jsonl")
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "answer": "b", "note": "\\ud83d"}\n{"prompt": "\\ud83d\\ude00", '
                                      '"answer": 3}')  # fmt: skip
    preflight(recipe)
    asked = read_questions(recipe.evaluate.tasks["quiz"], rng_seed=0, root=recipe.data.root)
    assert [question.prompt for question in asked] == ["a", "😀"]


def test_a_home_folder_in_a_path_is_the_same_for_the_check_and_for_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = pico_recipe(tmp_path, "run", "data.root='~'", "evaluate.harness.tasks.gsm8k='~/g.jsonl'")
    assert len(read_questions(recipe.evaluate.tasks["quiz"], rng_seed=0, root=recipe.data.root)) == 6
    assert requests_of(recipe)[0].file == tmp_path / "g.jsonl"
    assert pico_recipe(tmp_path, "x", "run='~/x'").run_folder == str(tmp_path / "x")


def test_task_files_may_be_packed_and_written_in_capitals(tmp_path: Path) -> None:
    import gzip

    import zstandard

    text = "\ufeff" + json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\n"
    for name, pack in (("Q.JSONL", bytes), ("Q.JSONL.GZ", gzip.compress),
                       ("q.jsonl.zst", zstandard.ZstdCompressor().compress)):  # fmt: skip
        (tmp_path / name).write_bytes(pack(text.encode()))
        assert list(json_objects(tmp_path / name, "x")) == [(f"{tmp_path / name}:1", {"prompt": "a\u2028b"})]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 100])
def test_pieces_are_those_of_the_whole_however_it_is_cut(size: int) -> None:
    text = "a\n\n\nb\n\n\n\nc\n\n\n\n\n\n\n\nd\n\n"
    blocks = [text[i : i + size] for i in range(0, len(text), size)]
    assert list(pieces(blocks, "\n\n\n")) == text.split("\n\n\n")
    assert list(pieces([block.encode() for block in blocks], b"\n")) == text.encode().split(b"\n")


def test_what_does_not_fit_on_the_disk_is_refused_before_training_and_told_by_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pico_recipe(tmp_path, "run")
    planned = plan(recipe)
    rows = {row["stage"]: row["disk_bytes"] for row in planned["stages"]}
    needed = planned["totals"]["to_write_bytes"]
    assert max(rows.values()) < needed < sum(rows.values()) == planned["totals"]["disk_bytes"]
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(disk, "free_bytes", lambda path, free=free: free)
        monkeypatch.setattr("btx.planning.plan.free_bytes", lambda path, free=free: free)
        parts = plan_tables(plan(recipe) | {"data": []})
        told = [part for part in parts if isinstance(part, str) and "would be refused" in part]
        assert bool(told) is not fits
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    with pytest.raises(RunFolderError, match=re.escape("GB are free there; free space, choose another disk")):
        run_here(recipe, ["data", "seed"])
    assert not (tmp_path / "run" / "seed" / "model").exists()


@pytest.mark.parametrize("override", [
    "run={}", "data.root={}", "data.domains.birds={}", "data.domains.birds={{path: birds.jsonl, held_out: {}}}",
    "seed_model.path={}", "evaluate.tasks.quiz.path={}", "evaluate.harness.tasks.gsm8k={}",
])  # fmt: skip
@pytest.mark.parametrize(("path", "message"), [
    ("''", "names nothing"), ('"a\\0b"', "no zero character"), ("x" * 300, "longer than a path can be"),
    ("a/" * 2500, "longer than a path can be"),
])  # fmt: skip
def test_what_cannot_be_a_path_is_refused_when_the_recipe_is_read(
    tmp_path: Path, override: str, path: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        pico_recipe(tmp_path, "run", override.format(path))


def test_a_user_that_does_not_exist_has_no_home_and_that_is_no_crash(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"~nobody_here/x\.jsonl: no such file"):
        preflight(pico_recipe(tmp_path, "run", "data.domains.birds=~nobody_here/x.jsonl"))


@pytest.mark.parametrize(("axes", "variants", "message"), [
    ({}, {"sweep.json": {}}, "a variant cannot be called 'sweep.json'"),
    ({f"k{n}": list(range(100)) for n in range(6)}, {}, "1,000,000,000,000 combinations"),
])  # fmt: skip
def test_a_sweep_of_impossible_names_or_numbers_is_refused_at_once(
    axes: dict[str, list[int]], variants: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        combinations(variants, axes, plain="x")
