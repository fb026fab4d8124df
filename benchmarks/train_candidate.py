"""One candidate of `benchmarks/train.py`, in a process of its own: builds a model and does training steps when asked.

    python benchmarks/train_candidate.py '{"trainer": "btx", ...}'    (an `Order` as JSON)

Requests come as lines of JSON on stdin, answers go as lines of JSON to stdout: {"do": "build"}, {"do": "steps",
"count": N}, {"do": "peak"}. What the steps are timed with is here, and `btx_step` is the one place that knows how btx
trains, so that one process can run another version of btx by its PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Step = Callable[[int], None]
"""An optimiser step, by number; on a GPU it may still be running when this returns."""
DISTINCT_BATCHES = 4
"""Batches are made before and taken in turn: what is timed is training, not drawing random numbers."""


@dataclass(frozen=True)
class Shape:
    """A model and its batches. The head size is hidden / heads; embeddings are tied."""

    hidden: int
    ff: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    sequence: int
    """S, tokens of a packed sequence."""
    document: int
    """Tokens of each document in it; the last one is cut."""
    step_tokens: int
    micro_batch_tokens: int
    checkpointing: bool = False
    """Whether activations are recomputed in the backward pass."""
    experts: int = 0
    """0: a dense model."""
    k: int = 0


@dataclass(frozen=True)
class Order:
    """What a process is to measure."""

    trainer: str
    """btx or transformers."""
    shape: Shape
    device: str
    trainable: str = "all"
    compiled: bool = False
    """transformers: the whole model under torch.compile. btx: as its settings say."""
    settings: dict[str, Any] = field(default_factory=dict)
    """btx: fields of the recipe's training section."""
    threads: int | None = None
    clock: str = "wall"
    """cpu: the process's processor seconds instead."""

    @classmethod
    def read(cls, text: str) -> Order:
        """What `json.dumps(asdict(order))` wrote."""
        values = json.loads(text)
        return cls(**values | {"shape": Shape(**values["shape"])})

    @property
    def precision(self) -> str:
        """Of the arithmetic; weights and AdamW's moments are float32 in both trainers unless settings say otherwise."""
        return "bfloat16" if self.device == "cuda" else "float32"


class PackedDocuments:
    """Random tokens as documents of equal length, packed into sequences: what btx calls samples."""

    fingerprint = "random"

    def __init__(self, shape: Shape, rows: int) -> None:
        import numpy as np

        from btx.data.mixture import Batch

        self.sequence_length = shape.sequence
        positions = np.tile(np.arange(shape.sequence) % shape.document, (rows, 1))
        self.batches = []
        for number in range(DISTINCT_BATCHES):
            ids = np.random.default_rng(number).integers(0, shape.vocabulary, (rows, shape.sequence))
            self.batches.append(Batch(ids, np.roll(ids, -1, axis=1), positions))

    def batch(self, start: int, count: int) -> Any:
        """The step's batch; all steps have the same number of samples."""
        return self.batches[start // count % DISTINCT_BATCHES]


def new_model(order: Order) -> Any:
    """A Llama or Mixtral with random float32 weights on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    shape = order.shape
    values: dict[str, Any] = {
        "hidden_size": shape.hidden, "intermediate_size": shape.ff, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2 * shape.sequence, "tie_word_embeddings": True, "use_cache": False,
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device(order.device):
        if not shape.experts:
            return LlamaForCausalLM(LlamaConfig(**values))
        model: Any = MixtralForCausalLM(MixtralConfig(
            num_local_experts=shape.experts, num_experts_per_tok=shape.k, **values
        ))  # fmt: skip
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.mlp.gate.weight, std=0.02)  # some versions leave routers at zero
    return model


def btx_step(model: Any, order: Order, samples: PackedDocuments) -> Step:
    """btx's own training step, as the training loop of this version of btx does it."""
    import torch

    from btx.models.loading import checkpoint_activations
    from btx.models.trainable import set_trainable
    from btx.moe.balancing import Balancing
    from btx.moe.layer import swap_in_moe
    from btx.recipe.training import Finetune, Train
    from btx.training.checkpoints import NoCheckpoints
    from btx.training.job import TrainingJob
    from btx.training.optimizer import adamw
    from btx.training.step import training_step

    shape = order.shape
    values: dict[str, Any] = {
        "tokens": 10**12, "batch_tokens": shape.step_tokens, "micro_batch_tokens": shape.micro_batch_tokens,
        "learning_rate": 1e-5, "precision": order.precision, "gradient_checkpointing": shape.checkpointing,
        "trainable": order.trainable, **order.settings,
    }  # fmt: skip
    settings: Finetune | Train
    if shape.experts:
        swap_in_moe(model)
        settings = Finetune(**values)
        balancing = Balancing.of(settings)
    else:
        settings, balancing = Train(domains=["benchmark"], **values), Balancing()
    set_trainable(model, order.trainable)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    model.train()
    job = TrainingJob(
        model=model, mixture=samples, settings=settings, folder=Path(), checkpoints=NoCheckpoints(),
        flops_per_token=0.0, rng_seed=0, device=torch.device(order.device), balancing=balancing,
        experts=[str(number) for number in range(shape.experts)],
    )  # fmt: skip
    optimizer, rows = adamw(model, settings), shape.step_tokens // shape.sequence
    return lambda number: training_step(job, optimizer, number, rows) and None


def transformers_step(model: Any, order: Order, samples: PackedDocuments) -> Step:
    """The plain loop that one writes over a transformers model: autocast, fused AdamW, clipping at norm 1. It does not
    keep packed documents apart, and never reads its loss."""
    import torch
    from torch import nn

    from btx.models.loading import checkpoint_activations  # transformers', by version

    shape, device = order.shape, order.device
    model.train()
    if shape.experts:
        model.set_experts_implementation("grouped_mm")  # batched_mm takes gigabytes and is slower on CPUs
    if shape.checkpointing:
        checkpoint_activations(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if order.compiled else model
    rows, micro = shape.step_tokens // shape.sequence, shape.micro_batch_tokens // shape.sequence

    def step(number: int) -> None:
        ids = torch.from_numpy(samples.batch(number * rows, rows).input_ids)
        for start in range(0, rows, micro):
            part = ids[start : start + micro].to(device, non_blocking=True)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = forward(input_ids=part, labels=part).loss * (len(part) / rows)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class Candidate:
    """A model that trains, and what it takes."""

    def __init__(self, order: Order) -> None:
        import torch

        self.order, self.number = order, 0
        self.device = torch.device(order.device)
        self.resident = 0.0
        self.step: Step

    def build(self) -> dict[str, Any]:
        """Make the model; what is known of it without a step."""
        import torch

        from btx.models.cost import model_cost
        from btx.training.peak_memory import peak_memory_bytes, reset_peak_memory

        if self.order.threads:
            torch.set_num_threads(self.order.threads)
        torch.zeros(1, device=self.device)
        reset_peak_memory(self.device)
        self.resident = peak_memory_bytes(self.device)
        started, shape = time.perf_counter(), self.order.shape
        model = new_model(self.order)
        samples = PackedDocuments(shape, shape.step_tokens // shape.sequence)
        make = btx_step if self.order.trainer == "btx" else transformers_step
        self.step = make(model, self.order, samples)
        self._wait()
        cost = model_cost(model)
        return {
            "build_s": round(time.perf_counter() - started, 2), "params": cost.total_params,
            "active_params": cost.active_params, "threads": torch.get_num_threads(),
            "flops_per_token": training_flops_per_token(cost, shape.sequence), **machine(self.order.device),
        }  # fmt: skip

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds of so many steps, one after the other, until the device is done with the last."""
        clock = time.process_time if self.order.clock == "cpu" else time.perf_counter
        started = clock()
        for _ in range(count):
            self.step(self.number)
            self.number += 1
        self._wait()
        return {"seconds": clock() - started}

    def peak(self) -> dict[str, Any]:
        """The most memory held since `build`, in GB; on a CPU what the process held before is taken off."""
        from btx.training.peak_memory import peak_memory_bytes

        before = self.resident if self.device.type == "cpu" else 0.0
        return {"peak_gb": round((peak_memory_bytes(self.device) - before) / 1e9, 3)}

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()


def training_flops_per_token(cost: Any, sequence: int) -> float:
    """4·N + 2·M + 6·L·H·Q·S, as model FLOPs utilisation counts: N active parameters in matrix products (the tied
    embedding once, as the head), M of them training, and attention over the half of the whole sequence that a causal
    mask leaves, whatever the documents in it need. What checkpointing recomputes is not counted.
    """
    return float(cost.training_flops_per_token(sequence / 2))


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured with."""
    import platform

    import torch
    import transformers

    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def processor_name() -> str:
    """The CPU's, where the system tells it."""
    import platform

    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def main() -> None:
    """Answer requests until there are none."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    order = Order.read(sys.argv[1])
    failure: dict[str, Any] = {}
    try:
        import transformers.models.llama.modeling_llama
        import transformers.models.mixtral.modeling_mixtral  # noqa: F401 - while the candidate before is still running

        from btx.models.loading import quiet_transformers

        quiet_transformers()
        candidate = Candidate(order)
    except Exception as error:
        failure = told(error)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = failure or getattr(candidate, request.pop("do"))(**request)
        except Exception as error:
            failure = answer = told(error)
        answers.write(json.dumps(answer) + "\n")


def told(error: Exception) -> dict[str, Any]:
    """An error as an answer; the rest of it goes to stderr."""
    traceback.print_exc()
    return {"error": f"{type(error).__name__}: {error}"[:500]}


if __name__ == "__main__":
    main()
