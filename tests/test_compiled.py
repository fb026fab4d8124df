"""Compiled layers: the same training, no compilation after the first step, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from btx.choices.routers import RoutingRule
from btx.models.loading import checkpoint_activations, new_model
from btx.moe import dispatch
from btx.moe.layer import moe_blocks, set_router, swap_in_moe
from btx.planning.speed import RandomSamples
from btx.process import Interrupts
from btx.recipe.training import Finetune
from btx.training import compiled
from btx.training.checkpoints import NoCheckpoints
from btx.training.job import TrainingJob
from btx.training.loop import Totals, run_training
from tests.conftest import PICO_LLAMA

LENGTH, SAMPLES, STEPS = 16, 5, 4
MIXTRAL = {**PICO_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of forward and backward are traced, and then run operation by operation: no C++ compiler is needed."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    counters.clear()


def model_of(kind: str) -> nn.Module:
    model = new_model({"model_type": kind, **(PICO_LLAMA if kind == "llama" else MIXTRAL)}, rng_seed=0)
    swap_in_moe(model)
    return model


def train(model: nn.Module, folder: Path, said: list[str], **settings: Any) -> Totals:
    """Four steps of five samples, in micro-batches of two: the last has one."""
    given = Finetune.model_validate({
        "tokens": STEPS * SAMPLES * LENGTH, "batch_tokens": SAMPLES * LENGTH, "micro_batch_tokens": 2 * LENGTH,
        "learning_rate": 1e-2, "warmup_steps": 0, **settings,
    })  # fmt: skip
    folder.mkdir(exist_ok=True)
    job = TrainingJob(model=model, mixture=RandomSamples(320, LENGTH), settings=given, folder=folder,
                      checkpoints=NoCheckpoints(), flops_per_token=1.0, rng_seed=0)  # fmt: skip
    return run_training(job, Interrupts(), said.append)


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    names = one.state_dict().keys()
    return names == two.state_dict().keys() and all(
        torch.equal(one.state_dict()[name], two.state_dict()[name]) for name in names
    )


@pytest.fixture
def graphs_by_step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graphs that have been made when each step of a training begins."""
    seen: list[int] = []
    at_step = compiled.accumulate_gradients.__globals__["at_step"]

    def note(model: nn.Module, step: int) -> None:
        seen.append(counters["stats"]["unique_graphs"])
        at_step(model, step)

    monkeypatch.setitem(compiled.accumulate_gradients.__globals__, "at_step", note)
    return seen


@pytest.mark.parametrize(("kind", "router"), [("llama", None), ("mixtral", "top_k"), ("mixtral", "sample_top1")])
def test_compiled_training_is_the_same_and_compiles_before_the_first_step_only(
    tmp_path: Path, kind: str, router: str | None, graphs_by_step: list[int]
) -> None:
    plain, model = model_of(kind), model_of(kind)
    if router is not None:
        for one in (plain, model):
            set_router(one, RoutingRule(router))  # type: ignore[arg-type]
    said: list[str] = []
    assert train(plain, tmp_path / "plain", said).compile_s == 0
    assert counters["stats"]["unique_graphs"] == 0
    graphs_by_step.clear()
    totals = train(model, tmp_path / "compiled", said, compile=True)
    assert same_weights(plain, model)
    assert [line for line in said if line.startswith("compiled 2 layers in ")]
    assert totals.compile_s > 0
    tried, steps = graphs_by_step[:2], graphs_by_step[2:]
    assert tried[0] == 0, "micro-batches of two and of one sample are tried"
    assert len(steps) == STEPS
    assert set(steps) == {counters["stats"]["unique_graphs"]}, "no graph is made in a step"
