"""What `btx plan` says of several processes for one model, and of models that no single GPU can measure."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from btx.cli.tables import plan_tables
from btx.models.cost import config_cost
from btx.models.measuring_memory import ANSWERING, cache_bytes, forward_bytes
from btx.models.memory import training_memory
from btx.models.step_counts import MemoryScheme, MicroBatch
from btx.planning.gpu_memory import memory_rows
from btx.planning.measuring import measuring_rows
from btx.planning.plan import plan
from btx.planning.speed import Speed, measured_speed
from btx.recipe.loading import load_recipe
from btx.recipe.training import Finetune
from btx.training.memory import MemoryNeeds
from tests.pico_run import pico_recipe
from tests.test_memory import FOUR_1B, LLAMA_1B

BFLOAT16 = MemoryScheme(working=2, frozen=2, arithmetic=2)
ALL, EMBEDDING = 3_651_864_576, 128_256 * 2048


@pytest.mark.parametrize(("processes", "state_gb"), [(2, 29), (4, 15), (8, 7)])
def test_each_process_has_its_share_of_the_state_and_a_copy_of_the_weights(processes: int, state_gb: float) -> None:
    """Four experts of 1B: shares of 16 bytes a parameter, as SCALE's table has them, and put together beside them every
    layer in bfloat16, the embedding, which is the head too, in float32 and bfloat16."""
    batch = MicroBatch(8192, 4096, checkpointed=True, on_gpu=True, dense_mask=False, processes=processes)
    memory = training_memory(config_cost(FOUR_1B).shape, BFLOAT16, batch)
    share, copy = 4 * ALL / processes, 2 * (ALL - EMBEDDING) + 6 * EMBEDDING
    assert memory.gradients == round(share)
    assert memory.optimizer == round(2 * share)
    assert memory.weights == pytest.approx(share + copy, abs=1)
    assert (memory.state - copy) / 1e9 == pytest.approx(state_gb, abs=0.6)


def test_a_frozen_weight_is_put_together_too_but_has_neither_gradient_nor_moments() -> None:
    shape = config_cost(LLAMA_1B, trainable="feed_forward").shape
    memory = training_memory(shape, MemoryScheme(), MicroBatch(4096, 4096, processes=4))
    total, trained = sum(shape.total.values()), 16 * 3 * 2048 * 8192
    assert memory.weights == total + 4 * total  # a quarter of 4 bytes each, and all of them in float32
    assert memory.gradients == trained
    assert memory.optimizer == 2 * trained


def test_the_fewest_processes_that_fit_share_a_step_equally_and_the_copy_is_a_floor() -> None:
    given = Finetune(tokens=1, batch_tokens=24 * 4096, micro_batch_tokens=4096, precision="bfloat16",
                     gradient_checkpointing=True)  # fmt: skip
    needs = MemoryNeeds(given, config_cost(FOUR_1B).shape, 4096, "cuda")
    assert not needs.memory.peak <= 40e9
    found = needs.processes_that_fit(int(40e9))
    assert found is not None
    assert 24 % found == 0
    peaks = [MemoryNeeds(given, needs.shape, 4096, "cuda", processes=count).memory.peak for count in (1, 2, 3, 4, 6)]
    assert peaks == sorted(peaks, reverse=True)
    assert found == next(count for count, peak in zip((1, 2, 3, 4, 6), peaks, strict=True) if peak <= 40e9)
    assert needs.processes_that_fit(2 * (ALL - EMBEDDING) + 6 * EMBEDDING) is None


def test_a_process_computes_no_more_than_its_share_of_a_step() -> None:
    given = Finetune(tokens=1, batch_tokens=8 * 1024, micro_batch_tokens=8 * 1024)
    needs = MemoryNeeds(given, config_cost(FOUR_1B).shape, 1024, "cuda", processes=4)
    assert needs.with_changes({}).micro_batch_tokens == 2 * 1024
    assert needs.that_fits(10**12) == needs.with_changes({}), "it fits as it is"
    told = [name for variant, _ in needs.savings() for name in variant.changed]
    assert "optimizer" not in told, "moments in 8 bits cannot be shared"


def test_hours_are_those_of_all_gpus_and_processors_are_shared(tmp_path: Path) -> None:
    def hours(*overrides: str) -> dict[str, float]:
        rows = plan(pico_recipe(tmp_path, "run", *overrides), speed=Speed(1e9, "as given"))["stages"]
        assert {row["stage"]: row["processes"] for row in rows if row["stage"] in ("train/birds", "mix")} == {
            "train/birds": 4 if overrides[-1:] and "processes" in overrides[-1] else 1, "mix": 1,
        }  # fmt: skip
        return {row["stage"]: row["hours"] for row in rows}

    one = hours()
    flops = {row["stage"]: row["flops"] for row in plan(pico_recipe(tmp_path, "run"))["stages"]}
    assert one["train/birds"] == pytest.approx(flops["train/birds"] / 1e9 / 3600)
    gpus = hours("device=cuda", "launch.processes={train: 4}")
    assert gpus["train/birds"] == pytest.approx(one["train/birds"] / 4)
    assert gpus["finetune"] == pytest.approx(one["finetune"])
    assert hours("launch.processes=4") == pytest.approx(one), "four processes on the same processors"
    spread = plan(pico_recipe(tmp_path, "run", "launch.kind=slurm", "launch.nodes={finetune: 2}",
                              "launch.processes={finetune: 2}"), speed=Speed(1e9, "as given"))  # fmt: skip
    in_all = {row["stage"]: row["hours"] for row in spread["stages"]}
    assert in_all["finetune"] == pytest.approx(one["finetune"] / 2)
    assert spread["totals"]["machine_hours"] == pytest.approx(sum(one.values())), "two machines for half of the time"
    planned = plan(pico_recipe(tmp_path), speed=Speed(1e9, "as given"))
    told = plan_tables(planned | {"data": []})
    assert any("hours at 1.00e+09 FLOP/s a device: as given" in text for text in told if isinstance(text, str))


@pytest.mark.parametrize(("gpu", "reached", "threads"), [(True, 25.0, None), (False, 100.0, 8)])
def test_what_several_processes_reached_is_told_of_one_gpu_or_of_all_threads(
    gpu: bool, reached: float, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    done = {"flops": 1000.0, "wall_s": 10.0, "processes": 4, "threads": 2}
    run: Any = SimpleNamespace(
        graph=[SimpleNamespace(name="seed", trains=True)],
        done=lambda stage: done,
        recipe=SimpleNamespace(device="auto"),
    )
    assert measured_speed(run) == Speed(reached, "as measured in seed", threads)


def test_the_memory_of_a_machine_is_that_of_all_processes_on_it(tmp_path: Path) -> None:
    for launch in ("launch.jobs=1", "launch.kind=slurm"):  # on a cluster a job has its machine alone
        planned = plan(pico_recipe(tmp_path, "run", launch, "launch.processes=2"))
        memory = {row["stage"]: row["memory_bytes"] for row in planned["stages"]}
        assert planned["totals"]["memory_bytes"] == 2 * max(memory.values())


def big(*overrides: str) -> Any:
    return load_recipe("demo", ["device=cuda", "finetune.precision=bfloat16", *overrides])


def test_measuring_takes_weights_a_forward_pass_and_the_answers_keys_and_values() -> None:
    recipe = big()
    rows = {row["model"]: row for row in measuring_rows(recipe, LLAMA_1B, 80_000_000_000)}
    cost = config_cost(LLAMA_1B)
    keys_and_values = 32_768 * 16 * 2 * (8 * 64) * 2
    assert cache_bytes(cost.shape, 2, ANSWERING) == keys_and_values
    wanted = 2 * cost.total_params + forward_bytes(cost.shape, 2, ANSWERING) + keys_and_values
    assert rows["seed"] == {"model": "seed", "memory_bytes": wanted, "weights_bytes": 2 * cost.total_params,
                            "fits": True, "gpus": 1}  # fmt: skip
    assert rows["btx"]["weights_bytes"] == 2 * (cost.total_params + 3 * 16 * 3 * 2048 * 8192 + 16 * 4 * 2048)
    few = {row["model"]: row for row in measuring_rows(recipe, LLAMA_1B, 9_000_000_000)}
    assert few["seed"]["gpus"] == 1
    assert not few["btx"]["fits"]
    assert few["btx"]["gpus"] == 3
    assert measuring_rows(recipe, LLAMA_1B, 2_000_000_000)[0]["gpus"] is None


def test_the_rows_of_gpus_name_the_processes(tmp_path: Path) -> None:
    rows = memory_rows(pico_recipe(tmp_path, "run", "launch.processes={finetune: 2}"),
                       {**LLAMA_1B, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 320}, 10**10)  # fmt: skip
    assert {row["stage"]: row["processes"] for row in rows}["finetune"] == 2
    assert {row["processes"] for row in rows if row["stage"] != "finetune"} == {1}
    assert all(row["processes_that_fit"] == 1 for row in rows)
