"""Decoder layers compiled by torch before training, with the layers' names, weights and places as they are.

Layer by layer: all layers of a kind are one graph, which takes seconds instead of minutes, and activation checkpointing
stays that of a layer (order: checkpointing, compile, later `fully_shard`; torchtitan does the same). A MoE layer is
compiled whole where its experts are one grouped product; the loop over experts, which waits for their numbers of rows,
is left out. Embedding, last norm and head stay as they are; of the loss, what is between its products is compiled.

All is compiled before the first step, on its micro-batches, whose gradients are thrown away: so compile time is no
step's time, and where compiling fails nothing has happened yet. Every shape gets its own graph: all micro-batches of a
step have one, the last perhaps another.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from btx.models.sharding import is_sharded, whole
from btx.moe.dispatch import can_group
from btx.moe.layer import MoE, moe_blocks
from btx.system_errors import first_line, is_out_of_memory
from btx.training.job import TrainingJob
from btx.training.losses import COMPILED_CHUNK_LOSS, chunk_loss
from btx.training.step import accumulate_gradients, samples_at_once
from btx.training.working_weights import master_of

BACKEND = "inductor"
GRAPHS_FLOPS = 2e11
"""FLOPs of a layer on a micro-batch below which a GPU waits for Python, which launches a kernel in some 10 µs and a
layer's hundred in a millisecond."""
PASSES_TO_REPLAY = 3
"""torch runs what is to be a CUDA graph once, then records it, then replays it."""


@contextlib.contextmanager
def compiled_layers(
    job: TrainingJob, optimizer: torch.optim.Optimizer, steps: range, log: Callable[[str], None]
) -> Iterator[float]:
    """Inside, the layers of the job's model are compiled, if its settings want that and it works; else a line says why
    not. Weights, gradients and the optimiser stay as they are.

    Args:
        steps: those to come; samples of the first are tried.

    Yields:
        Seconds that compiling took.
    """
    started, layers = time.perf_counter(), decoder_layers(job.model)
    on_gpu, settings, length = job.device.type == "cuda", job.settings, job.mixture.sequence_length
    wanted = settings.compiles(length, len(layers), on_gpu=on_gpu)
    if not steps or not wanted:
        if steps and on_gpu and settings.compile == "auto":
            log(f"layers are not compiled, which would take longer than it saves in {settings.steps(length)} steps; "
                f"compile: true does it")  # fmt: skip
        yield 0.0
        return
    for graphs in [True, False] if small_enough_for_graphs(job, len(layers)) else [False]:
        with contextlib.ExitStack() as undo:
            undo.callback(torch.compiler.reset)
            why_not = cannot_compile(job.device) if layers else f"none are known of {type(job.model).__name__}"
            if why_not is None:
                _compile(job, layers, graphs, undo)
                with warnings.catch_warnings(action="ignore"):  # torch warns of what it does itself while it traces
                    why_not = _try(job, optimizer, steps[0], PASSES_TO_REPLAY if graphs else 1)
            seconds = time.perf_counter() - started
            if why_not is None:
                log(f"compiled {len(layers)} layers{' with CUDA graphs' * graphs} in {seconds:.0f} s")
                yield seconds
                return
        log(f"layers are not compiled{' with CUDA graphs' * graphs}: {why_not}; training goes on without")
    yield time.perf_counter() - started


def small_enough_for_graphs(job: TrainingJob, layers: int) -> bool:
    """Whether CUDA graphs are worth it: with `auto`, where a layer takes a GPU less than it takes Python to launch it.
    Activation checkpointing runs a layer in its backward pass, where no graph can be replayed."""
    settings = job.settings
    if job.device.type != "cuda" or settings.compile != "auto" or settings.gradient_checkpointing or not layers:
        return False
    if is_sharded(job.model):  # its weights are put together in memory that is another in every step
        return False
    tokens = samples_at_once(job) * job.mixture.sequence_length
    return job.flops_per_token * tokens / layers < GRAPHS_FLOPS


def cannot_compile(device: torch.device) -> str | None:
    """Why torch's compiler makes nothing for this device on this machine; None if it may."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)"
    compilers = filter(None, [os.environ.get("CXX"), "g++", "clang++", "c++"])
    return None if any(map(shutil.which, compilers)) else "there is no C++ compiler (g++ or clang++)"


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers would checkpoint, in order."""
    return [module for module in model.modules() if isinstance(module, _checkpointing_layer())]


def _checkpointing_layer() -> type:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return GradientCheckpointingLayer


def _compile(job: TrainingJob, layers: list[nn.Module], graphs: bool, undo: contextlib.ExitStack) -> None:
    """Let everything be compiled when it first runs."""
    model, mode = job.model, "reduce-overhead" if graphs else None
    for block in moe_blocks(model):
        if not _experts_are_traced(job, block):
            _put(block.experts, "forward", torch.compiler.disable(block.experts.forward), undo)
        if block.rule.rule.kind == "sample_top1":  # its temperature is another constant in every step
            _put(block, "route", torch.compiler.disable(block.route), undo)
    for layer in layers:
        _put(layer, "forward", _compiled_forward(layer, backend=BACKEND, dynamic=False, mode=mode), undo)
    setattr(model, COMPILED_CHUNK_LOSS, torch.compile(chunk_loss, backend=BACKEND, dynamic=False))
    undo.callback(delattr, model, COMPILED_CHUNK_LOSS)
    if graphs:
        base_model = cast(Any, model).base_model
        undo.callback(base_model.register_forward_pre_hook(_BeforeGraphs(base_model)).remove)


def _compiled_forward(layer: nn.Module, **options: Any) -> Callable[..., Any]:
    """A layer's forward, compiled, inside the checkpoint if there is one: torch would compile no MoE layer around it.

    transformers 5.17 checkpoints in `__call__`, which is around any forward; 5.24 in a forward around the class's own.
    """
    uncompiled = getattr(type(layer).forward, "__wrapped__", None)
    if uncompiled is None or "__call__" in vars(_checkpointing_layer()):
        return _routing_as_wanted(layer, torch.compile(layer.forward, **options))
    compiled, either = _routing_as_wanted(layer, torch.compile(uncompiled.__get__(layer), **options)), cast(Any, layer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if either.gradient_checkpointing and layer.training and torch.is_grad_enabled():
            return either._gradient_checkpointing_func(partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    return forward


def _routing_as_wanted(layer: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, whose one graph always leaves its decisions in `MoE.routing`: in a recomputation they are put back
    here. A second graph, without them, would keep other tensors for the backward pass, which checkpointing refuses."""
    blocks = moe_blocks(layer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        before = [(block, block.routing) for block in blocks if not block.keeps_routing]
        try:
            return compiled(*args, **kwargs)
        finally:  # a recomputation ends with an exception
            for block, routing in before:
                block.routing = routing

    return forward if blocks else compiled


def _put(module: nn.Module, method: str, instead: Callable[..., Any], undo: contextlib.ExitStack) -> None:
    """An attribute of the module in front of its class's method."""
    setattr(module, method, instead)
    undo.callback(vars(module).pop, method)


def _experts_are_traced(job: TrainingJob, block: MoE) -> bool:
    """Whether the experts of a layer are a grouped product in bfloat16; torch 2.13 cannot trace one in float32."""
    down_EDF = block.experts.down_proj
    x_TD = down_EDF.new_empty(0, down_EDF.shape[1], dtype=torch.bfloat16)
    return job.in_bfloat16 and can_group(x_TD, down_EDF)


class _BeforeGraphs:
    """Hook before a micro-batch: what CUDA graphs gave in the one before may be overwritten from here on. So gradients
    have memory of their own, for autograd would keep a graph's and add to it; but where a master copies them."""

    def __init__(self, base_model: nn.Module) -> None:
        trained = [p for p in base_model.parameters() if p.requires_grad and master_of(p) is p]
        self._gradients = [(p, torch.empty_like(p, dtype=cast(Any, p).grad_dtype)) for p in trained]
        self._taken = [p for p in base_model.parameters() if master_of(p) is not p and _takes_as_it_is(p)]

    def __call__(self, base_model: nn.Module, arguments: object) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        if first := [(parameter, memory) for parameter, memory in self._gradients if parameter.grad is None]:
            torch._foreach_zero_([memory for _, memory in first])
            for parameter, memory in first:
                parameter.grad = memory
        for parameter in self._taken:
            parameter.grad = torch.zeros_like(parameter)


def _takes_as_it_is(parameter: nn.Parameter) -> bool:
    """Whether a weight's master keeps the gradient that it is given, and no copy in another type."""
    return cast(Any, master_of(parameter)).grad_dtype == parameter.dtype


def _try(job: TrainingJob, optimizer: torch.optim.Optimizer, step: int, passes: int) -> str | None:
    """Forward and backward of every shape of micro-batch in a step; returns what goes wrong."""
    length, micro = job.mixture.sequence_length, samples_at_once(job)
    samples = job.settings.step_samples(length)
    try:
        for count in sorted({min(micro, samples), samples % micro} - {0}):
            norms = []
            for _ in range(passes):
                accumulate_gradients(job, step, range(step * samples, step * samples + count))
                norms.append(_gradient_norm(optimizer))
            if passes > 1 and not abs(norms[-1] - passes * norms[0]) < 0.05 * norms[-1]:
                return f"a gradient of norm {norms[0]:.4g} becomes {norms[-1]:.4g} when it is added up {passes} times"
            optimizer.zero_grad(set_to_none=True)
    except Exception as error:  # whatever goes wrong in there; a fault of the model's own will show without it
        if is_out_of_memory(error) and passes == 1:  # CUDA graphs keep memory of their own: without, it may do
            raise
        cause = getattr(error, "inner_exception", error)  # of torch's BackendCompilerFailed
        return f"{type(cause).__name__}: {first_line(cause)}"
    finally:
        optimizer.zero_grad(set_to_none=True)
    return None


def _gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return whole(nn.utils.get_total_norm(gradients)).item()
