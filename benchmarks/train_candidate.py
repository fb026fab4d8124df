"""One candidate of `benchmarks/train.py`, in a process of its own: builds a model and trains it when asked.

    python benchmarks/train_candidate.py '{"trainer": "btx", ...}'    (an `Order` as JSON)

Requests are lines of JSON on stdin, answers lines of JSON on stdout: {"do": "build"}, {"do": "steps", "count": N},
{"do": "peak"}. btx trains with its own loop, `run_training`, as every stage of a run does; it is held at the door where
it asks for the next step's samples. So another version of btx, by its PYTHONPATH, is timed with the same lines.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

ENDLESS = 10**12
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
    """Random tokens as documents of equal length, packed into sequences: what btx calls samples.

    Args:
        before_step: called when the samples of a step are asked for that is not the one before.
    """

    fingerprint = "random"

    def __init__(self, shape: Shape, before_step: Callable[[], None]) -> None:
        import numpy as np

        from btx.data.mixture import Batch

        self.sequence_length, self.rows = shape.sequence, shape.step_tokens // shape.sequence
        self.before_step, self.latest = before_step, -1
        positions = np.tile(np.arange(shape.sequence) % shape.document, (self.rows, 1))
        self.batches = []
        for number in range(DISTINCT_BATCHES):
            ids = np.random.default_rng(number).integers(0, shape.vocabulary, (self.rows, shape.sequence))
            self.batches.append(Batch(ids, np.roll(ids, -1, axis=1), positions))

    def batch(self, start: int, count: int) -> Any:
        """The first samples of a step, or all of them. A step may be tried before it is done, as compiling does."""
        if start != self.latest:
            self.before_step()
            self.latest = start
        whole = self.batches[start // self.rows % DISTINCT_BATCHES]
        if count == self.rows:
            return whole
        return type(whole)(whole.input_ids[:count], whole.labels[:count], whole.position_ids[:count])


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


def train_with_btx(model: Any, order: Order, samples: PackedDocuments) -> None:
    """btx's training loop, without checkpoints, for ever."""
    import tempfile

    import torch

    from btx.models.cost import model_cost
    from btx.moe.balancing import Balancing
    from btx.process import Interrupts
    from btx.training.checkpoints import Checkpoints
    from btx.training.job import TrainingJob
    from btx.training.loop import run_training

    settings, shape = training_settings(order), order.shape
    with tempfile.TemporaryDirectory() as folder:
        job = TrainingJob(
            model=model, mixture=samples, settings=settings, folder=Path(folder), checkpoints=Checkpoints(),
            flops_per_token=model_cost(model).training_flops_per_token(shape.sequence), rng_seed=0,
            device=torch.device(order.device), balancing=Balancing.of(settings) if shape.experts else Balancing(),
            experts=[str(number) for number in range(shape.experts)],
        )  # fmt: skip
        run_training(job, Interrupts(), lambda line: print(line, file=sys.stderr))


def training_settings(order: Order) -> Any:
    """The section of a recipe that trains such a model."""
    from btx.recipe.training import Finetune, Train

    shape = order.shape
    values: dict[str, Any] = {
        "tokens": ENDLESS, "batch_tokens": shape.step_tokens, "micro_batch_tokens": shape.micro_batch_tokens,
        "learning_rate": 1e-5, "precision": order.precision, "gradient_checkpointing": shape.checkpointing,
        "trainable": order.trainable, "checkpoint_every": ENDLESS, **order.settings,
    }  # fmt: skip
    return Finetune(**values) if shape.experts else Train(domains=["benchmark"], **values)


def train_with_transformers(model: Any, order: Order, samples: PackedDocuments) -> None:
    """The plain loop that one writes over a transformers model: autocast, fused AdamW, clipping at norm 1. It does not
    keep packed documents apart, and never reads its loss."""
    import torch
    from torch import nn

    shape, device = order.shape, order.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if order.compiled else model
    rows, micro = samples.rows, shape.micro_batch_tokens // shape.sequence
    for step in count():
        ids = torch.from_numpy(samples.batch(step * rows, rows).input_ids)
        for start in range(0, rows, micro):
            part = ids[start : start + micro].to(device, non_blocking=True)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = forward(input_ids=part, labels=part).loss * (len(part) / rows)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Candidate:
    """A model that trains, and what it takes.

    Args:
        requests: lines of JSON.
        answers: one for each goes here.
    """

    def __init__(self, order: Order, requests: Iterator[str], answers: IO[str]) -> None:
        self.order, self.requests, self.answers = order, requests, answers
        self.resident = 0.0
        self.left = 0
        """Steps that are asked for and not begun."""
        self.started = (0.0, 0.0)
        """When they were asked for, by both clocks."""
        self.clock = time.process_time if order.clock == "cpu" else time.perf_counter
        self.model: Any = None

    def answer_all(self) -> None:
        """Until there are no more requests. What fails is the answer to all that follow."""
        try:
            self._wait_for_steps()
            samples = PackedDocuments(self.order.shape, self._before_step)
            (train_with_btx if self.order.trainer == "btx" else train_with_transformers)(
                self.model, self.order, samples
            )
        except Exception as error:
            traceback.print_exc()
            failure = {"error": f"{type(error).__name__}: {error}"[:500]}
            self._answer(failure)
            for _ in self.requests:
                self._answer(failure)

    def _wait_for_steps(self) -> None:
        """Answer requests until steps are asked for; ends the process where there are no more."""
        for line in self.requests:
            request = json.loads(line)
            if request["do"] == "steps":
                self.left, self.started = request["count"], (self.clock(), time.perf_counter())
                return
            self._answer({"build": self._build, "peak": self._peak}[request["do"]]())
        raise SystemExit

    def _before_step(self) -> None:
        """When all steps are done that were asked for, say how long they took."""
        if not self.left:
            self._wait_for_device()
            clock, wall = self.started
            self._answer({"seconds": self.clock() - clock, "wall_s": time.perf_counter() - wall})
            self._wait_for_steps()
        self.left -= 1

    def _build(self) -> dict[str, Any]:
        """Make the model; what is known of it without a step."""
        import torch

        from btx.models.cost import model_cost
        from btx.models.loading import checkpoint_activations
        from btx.models.trainable import set_trainable
        from btx.moe.layer import swap_in_moe
        from btx.training.peak_memory import peak_memory_bytes, reset_peak_memory

        order, shape, device = self.order, self.order.shape, torch.device(self.order.device)
        if order.threads:
            torch.set_num_threads(order.threads)
        torch.zeros(1, device=device)
        reset_peak_memory(device)
        self.resident = peak_memory_bytes(device) if device.type == "cpu" else 0.0
        started, self.model = time.perf_counter(), new_model(order)
        if order.trainer == "btx":
            swap_in_moe(self.model)
            set_trainable(self.model, order.trainable)
        elif shape.experts:
            self.model.set_experts_implementation("grouped_mm")  # batched_mm takes gigabytes and is slower on CPUs
        if shape.checkpointing:
            checkpoint_activations(self.model)
        self.model.train()
        self._wait_for_device()
        cost = model_cost(self.model)
        return {
            "build_s": round(time.perf_counter() - started, 2), "params": cost.total_params,
            "active_params": cost.active_params, "threads": torch.get_num_threads(),
            "flops_per_token": training_flops_per_token(cost, shape.sequence), **machine(order.device),
        }  # fmt: skip

    def _peak(self) -> dict[str, Any]:
        """The most memory held since the model was made, in GB; on a CPU what the process held before is taken off."""
        import torch

        from btx.training.peak_memory import peak_memory_bytes

        return {"peak_gb": round((peak_memory_bytes(torch.device(self.order.device)) - self.resident) / 1e9, 3)}

    def _wait_for_device(self) -> None:
        import torch

        if self.order.device == "cuda":
            torch.cuda.synchronize()

    def _answer(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self.answers, flush=True)


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
    """Answer the requests on stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    import transformers.models.llama.modeling_llama
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401 - while the candidate before is still running

    import btx.training.loop  # noqa: F401
    from btx.models.loading import quiet_transformers

    quiet_transformers()
    Candidate(Order.read(sys.argv[1]), iter(sys.stdin), answers).answer_all()


if __name__ == "__main__":
    main()
