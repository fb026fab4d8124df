"""`make bench-train` at pico size: every candidate trains, on the FLOPs that its formula says. Nothing is timed."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS = ("btx", "transformers-compile", "btx-ff", "btx-moe", "floor", "small", "transformers", "transformers-moe")


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    """benchmarks/train.py, imported as its command line does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("train")


@pytest.fixture(scope="module")
def pico(train: ModuleType) -> Any:
    """Hidden size 32, two sequences of documents of 5 tokens a step."""
    return train.Shape(32, 48, 2, 4, 2, 64, 16, 5, 32, 16)


def order(train: ModuleType, pico: Any, name: str, **changes: Any) -> Any:
    assert tuple(train.ROWS) == ROWS
    row = train.ROWS[name]
    shape = pico if row.model == "small" else train.shape_of(row, pico, "cpu", ["moe", "floor"])
    whole = train.Order(row.trainer, shape, "cpu", row.trainable)  # compiled: the same loop, and a compiler's minute
    return train.Order.read(json.dumps(asdict(replace(whole, **changes))))


@pytest.mark.parametrize("name", [name for name in ROWS if name != "small"])
def test_every_candidate_moves_its_weights_and_no_others(train: ModuleType, pico: Any, name: str) -> None:
    from train_candidate import Candidate

    asked, answers, before = order(train, pico, name), io.StringIO(), {}

    def requests() -> Iterator[str]:
        yield '{"do": "build"}'
        before.update({key: value.clone() for key, value in candidate.model.state_dict().items()})
        for number in (1, 2):
            yield json.dumps({"do": "steps", "count": number})
        yield '{"do": "peak"}'

    candidate = Candidate(asked, requests(), answers)
    with pytest.raises(SystemExit):  # the requests are at an end
        candidate.answer_all()
    built, first, block, peak = map(json.loads, answers.getvalue().splitlines())
    assert built["params"] > 0
    assert first.keys() == block.keys() == {"seconds", "wall_s"}
    assert peak.keys() == {"peak_gb"}
    moved = {key for key, value in candidate.model.state_dict().items() if not value.equal(before[key])}
    feed_forward = {key for key in before if ".mlp." in key}
    assert moved == (feed_forward if name == "btx-ff" else before.keys())


def test_what_fails_is_the_answer_to_everything_that_follows(train: ModuleType, pico: Any) -> None:
    from train_candidate import Candidate

    answers = io.StringIO()
    asked = order(train, pico, "btx", settings={"learning_rate": -1.0})
    Candidate(asked, iter(['{"do": "build"}', '{"do": "steps", "count": 1}', '{"do": "peak"}']), answers).answer_all()
    built, *failed = map(json.loads, answers.getvalue().splitlines())
    assert "error" not in built
    assert ["learning_rate" in answer["error"] for answer in failed] == [True, True]


def test_documents_are_packed_and_a_step_may_be_tried_before_it_is_done(train: ModuleType, pico: Any) -> None:
    from train_candidate import PackedDocuments

    steps: list[int] = []
    samples = PackedDocuments(pico, lambda: steps.append(len(steps)))
    tried, whole, following = samples.batch(0, 1), samples.batch(0, 2), samples.batch(2, 2)
    assert whole.position_ids.tolist() == [[*range(5), *range(5), *range(5), 0]] * 2
    assert (whole.labels[:, :-1] == whole.input_ids[:, 1:]).all()
    assert (tried.input_ids == whole.input_ids[:1]).all()
    assert (following.input_ids != whole.input_ids).any()
    assert steps == [0, 1]


def test_flops_are_those_of_the_formula_at_the_shape_of_llama_3_2_1b(train: ModuleType) -> None:
    from train_candidate import training_flops_per_token

    from btx.models.cost import config_cost

    shape = train.SHAPES["llama-3.2-1b"]
    layer = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048  # attention, feed-forward, norms
    N = 128_256 * 2048 + 16 * layer + 2048
    config = {"model_type": "llama", "hidden_size": shape.hidden, "intermediate_size": shape.ff,
              "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "vocab_size": shape.vocabulary,
              "num_key_value_heads": shape.kv_heads, "tie_word_embeddings": True}  # fmt: skip
    attention = 6 * 16 * 2048 * 4096
    assert N == 1_235_814_400
    assert training_flops_per_token(config_cost(config), 4096) == 6 * N + attention
    M = 16 * 3 * 2048 * 8192
    frozen = training_flops_per_token(config_cost(config, trainable="feed_forward"), 4096)
    assert frozen == 4 * N + 2 * M + attention


def measured(name: str, speed: float, **values: Any) -> dict[str, Any]:
    return {"name": name, "machine": "NVIDIA H100", "hidden": 2048, "layers": 16, "tokens_per_s": speed, "mfu": 0.25,
            "checkpointing": False, "peak_gb": 40.0, "first_steps_s": 1.0, **values}  # fmt: skip


def test_rows_of_one_run_are_compared_and_the_failed_one_says_why(train: ModuleType) -> None:
    failed = {"name": "btx-ff", "layers": 16, "checkpointing": False, "error": "out of memory"}
    rows = [measured("btx", 50.0), measured("transformers-compile", 40.0), measured("btx@baseline", 25.0), failed]
    assert train.with_ratios(rows)[0]["ratios"] == {"transformers-compile": 1.25, "btx@baseline": 2.0}
    table = train.table(rows).splitlines()
    assert table[2].endswith("| 50 | 25% | 40 | 1.0 | 1.25 x transformers-compile (goal 1.15), 2.00 x btx@baseline |")
    assert "out of memory" in table[-1]


def test_rows_of_other_machines_and_shapes_stay_in_the_file(train: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    train.write([measured("btx", 50.0), measured("btx", 9.0, machine="NVIDIA A100")], file)
    train.write([measured("btx", 60.0), measured("btx", 70.0, layers=8)], file)
    assert [row["tokens_per_s"] for row in json.loads(file.read_text("utf-8"))] == [9.0, 60.0, 70.0]
