"""Compiled layers: the same training, no compilation after the first step, nothing left behind."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from btx.choices.routers import RoutingRule
from btx.models import document_attention
from btx.models.device import has_bfloat16_units
from btx.models.from_scratch import new_model
from btx.models.loading import checkpoint_activations
from btx.moe import dispatch
from btx.moe.layer import MoE, set_router, swap_in_moe
from btx.planning.speed import RandomSamples
from btx.process import Interrupts
from btx.recipe.training import Finetune
from btx.training import compiled
from btx.training.checkpoints import Checkpoints
from btx.training.job import TrainingJob
from btx.training.loop import Totals, run_training
from btx.training.working_weights import hold_in_bfloat16, master_of
from tests import varlen_on_cpu
from tests.conftest import PICO_LLAMA

LENGTH, SAMPLES, STEPS = 16, 5, 4
MIXTRAL = {**PICO_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced, and then run operation by operation: no C++ compiler is needed."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    counters.clear()


def model_of(kind: str, **config: Any) -> nn.Module:
    config = {"model_type": kind, **(PICO_LLAMA if kind == "llama" else MIXTRAL), **config}
    model = new_model(config, rng_seed=0)
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
                      checkpoints=Checkpoints(), flops_per_token=1.0, rng_seed=0)  # fmt: skip
    return run_training(job, Interrupts(), lambda line: said.extend([line] if "compile" in line else []))


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

    def note(blocks: Sequence[MoE], step: int) -> None:
        seen.append(counters["stats"]["unique_graphs"])
        at_step(blocks, step)

    monkeypatch.setitem(compiled.accumulate_gradients.__globals__, "at_step", note)
    return seen


@pytest.mark.parametrize(("kind", "graphs"), [
    ("llama", 2 * 2), ("llama", None), pytest.param("mixtral", None, marks=pytest.mark.long),
])  # fmt: skip
def test_compiled_training_is_the_same_and_compiles_before_the_first_step_only(
    tmp_path: Path, kind: str, graphs: int | None, graphs_by_step: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if graphs is not None:  # as on a GPU; a CPU's attention is not traced
        varlen_on_cpu.register()
        monkeypatch.setattr(document_attention, "has_varlen", lambda device: True)
    plain, model = model_of(kind), model_of(kind)
    for one in (plain, model):
        set_router(one, RoutingRule("sample_top1")) if kind == "mixtral" else checkpoint_activations(cast(Any, one))
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
    if graphs is not None:  # of a layer and of the loss, for each of the two shapes
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["graph_break"]
    for module in model.modules():  # evaluated and saved as if it had never been compiled
        assert "forward" not in vars(module)
        assert "route" not in vars(module)
    assert not hasattr(model, "compiled_chunk_loss")


@pytest.mark.skipif(not has_bfloat16_units(), reason="this CPU does not multiply in bfloat16")
@pytest.mark.long
def test_checkpointed_moe_layers_with_a_grouped_product_are_one_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (dispatch, compiled):  # as on a GPU; a CPU does the same, slowly
        monkeypatch.setattr(module, "can_group", lambda *tensors: True)
    varlen_on_cpu.register()
    monkeypatch.setattr(document_attention, "has_varlen", lambda device: True)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager_decomp_partition")  # keeps what inductor would keep
    plain, model = (model_of("mixtral", num_hidden_layers=1) for _ in range(2))
    settings = {"precision": "bfloat16", "micro_batch_tokens": SAMPLES * LENGTH}  # one shape
    for one in (plain, model):
        checkpoint_activations(cast(Any, one))
    train(plain, tmp_path / "plain", [], **settings)
    said: list[str] = []
    train(model, tmp_path / "compiled", said, **settings, compile=True)
    assert [line for line in said if line.startswith("compiled 1 layers in ")]
    assert same_weights(plain, model)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2, "of the layer and of the loss"


def test_where_nothing_can_be_compiled_training_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    plain, without, failing = (model_of("llama") for _ in range(3))
    train(plain, tmp_path / "plain", said)
    assert said == [], "auto compiles nothing on a CPU"
    with monkeypatch.context() as patch:
        patch.setattr(compiled.shutil, "which", lambda name: None)
        train(without, tmp_path / "without", said, compile=True)
    assert said.pop() == (
        "layers are not compiled: there is no C++ compiler (g++ or clang++); training goes on without"
    )

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    train(failing, tmp_path / "failing", said, compile=True)
    assert said.pop() == ("layers are not compiled: RuntimeError: no such instruction; training goes on without")
    assert same_weights(plain, without)
    assert same_weights(plain, failing)


def test_a_gpu_without_triton_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert compiled.cannot_compile(torch.device("cuda")) == "triton is not installed (pip install triton)"
    assert compiled.cannot_compile(torch.device("cpu")) is None or shutil.which("g++") is None


def test_graphs_are_for_small_models_on_gpus(tmp_path: Path) -> None:
    def small(parameters: float, micro_batch_tokens: int = 8192, device: str = "cuda", **settings: Any) -> bool:
        given = Finetune(tokens=1, micro_batch_tokens=micro_batch_tokens, **settings)
        job = TrainingJob(model=nn.Module(), mixture=RandomSamples(320, 1024), settings=given, folder=tmp_path,
                          checkpoints=Checkpoints(), flops_per_token=6 * parameters, rng_seed=0,
                          device=torch.device(device))  # fmt: skip
        return compiled.small_enough_for_graphs(job, layers=8)

    assert small(7e6)
    assert not small(1.2e9)
    assert not small(7e6, micro_batch_tokens=2**20)
    assert not small(7e6, device="cpu", compile=True)
    assert not small(7e6, compile=True)
    assert not small(7e6, gradient_checkpointing=True)


def before_graphs(*, masters: bool, gradients: torch.dtype) -> tuple[Any, compiled._BeforeGraphs]:
    """A model held in bfloat16, without its head, and what is done before its graphs are replayed."""
    model = model_of("mixtral")
    hold_in_bfloat16(model, masters=masters, gradients=gradients)
    base_model = cast(Any, model).base_model
    return base_model, compiled._BeforeGraphs(base_model)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.long
def test_gradients_before_a_cuda_graph_have_the_type_in_which_they_add_up() -> None:
    base_model, before = before_graphs(masters=False, gradients=torch.float32)
    before(base_model, ())
    held = [parameter for parameter in base_model.parameters() if parameter.dtype == torch.bfloat16]
    assert held
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in held)
    for parameter in held:
        parameter.grad.fill_(1)
    before(base_model, ())
    assert all(parameter.grad.min() == 1 for parameter in held), "a second micro-batch adds up"
    for parameter in held:
        parameter.grad = None
    before(base_model, ())
    assert all(parameter.grad.count_nonzero() == 0 for parameter in held)


class Replayed(torch.autograd.Function):
    """Gives a gradient in memory that is not autograd's, as a CUDA graph does."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, memory: Tensor) -> Tensor:
        ctx.memory = memory
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.memory.detach(), None


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.long
def test_a_master_that_keeps_gradients_as_they_come_keeps_none_of_a_cuda_graph() -> None:
    """As `adamw_8bit` has them with one micro-batch a step."""
    base_model, before = before_graphs(masters=True, gradients=torch.bfloat16)
    held = [parameter for parameter in base_model.parameters() if master_of(parameter) is not parameter]
    assert held
    for passes in (1, 2):
        before(base_model, ())
        of_graph = [torch.ones_like(parameter) for parameter in held]
        for parameter, gradient in zip(held, of_graph, strict=True):
            Replayed.apply(parameter, gradient).backward()
        for gradient in of_graph:
            gradient.fill_(9)  # by the next replay
        assert all((master_of(parameter).grad == passes).all() for parameter in held)


def test_short_trainings_are_not_compiled_unless_asked() -> None:
    def compiles(steps: int, layers: int = 10, **settings: Any) -> bool:
        training = Finetune(tokens=4096 * steps, batch_tokens=4096, micro_batch_tokens=2048, **settings)
        return training.compiles(1024, layers, on_gpu=True)

    assert compiles(500)
    assert not compiles(499)
    assert not compiles(500, layers=9)
    assert compiles(1, compile=True)
    assert not compiles(500, compile=False)
    assert not Finetune(tokens=10**9).compiles(1024, 10, on_gpu=False)
    assert Finetune(tokens=1, compile=True).compiles(1024, 10, on_gpu=False)


def test_cuda_graphs_that_run_out_of_memory_are_left_out_and_layers_compiled_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    gradients, tried = compiled.accumulate_gradients, []

    def once(*arguments: Any) -> Any:
        tried.append(arguments)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradients(*arguments)

    monkeypatch.setattr(compiled, "small_enough_for_graphs", lambda job, layers: True)
    monkeypatch.setattr(compiled, "accumulate_gradients", once)
    train(model_of("llama"), tmp_path / "run", said, compile=True)
    assert said[0].startswith("layers are not compiled with CUDA graphs: OutOfMemoryError")
    assert said[1].startswith("compiled 2 layers in ")
