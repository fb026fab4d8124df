"""Where a training step's time goes, ours and the dense floor's: attention, matrix products of the feed-forward layers,
dispatch (sorting, gathering, adding up), router, LM head and loss, clipping, AdamW, everything else.

    python benchmarks/moe_profile.py [--hidden 512] [--ff 1408] [--experts 8] [--k 1] [--tokens 2048] [--threads 2]

Both models are those of benchmarks/moe.py and take turns; torch.profiler's own times, added up by part (a backward
operation belongs to the part its forward operation was in), medians over the repeats. What the profiler does not see
(Python, freeing memory) is "outside operations". The last column is the part's share in the difference.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from moe import SEQUENCE, VOCABULARY, Shape, build
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from btx.losses import next_token_loss
from btx.models import quiet_transformers
from btx.training import clip_gradients

PARTS = ("attention", "feed-forward products", "feed-forward elementwise", "dispatch", "router", "LM head and loss",
         "clipping", "AdamW", "norms, residuals, embeddings", "outside operations")  # fmt: skip
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
MOVES = {
    f"aten::{name}" for name in (
        "index_select", "index", "index_put_", "_index_put_impl_", "argsort", "sort", "bincount", "embedding_bag",
        "_embedding_bag", "_embedding_bag_forward_only",
    )
}  # fmt: skip
REST = "norms, residuals, embeddings"


def mark(module: nn.Module, name: str) -> None:
    """Let the profiler see what runs inside a module's forward pass."""
    spans: list[Any] = []

    def enter(*ignored: Any) -> None:
        spans.append(record_function(f"part/{name}"))
        spans[-1].__enter__()

    def leave(*ignored: Any) -> None:
        spans.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def stepper(name: str, shape: Shape) -> Callable[[], None]:
    """The training step of benchmarks/moe.py, its parts marked."""
    model = build(name, shape, "cpu").train()
    for layer in model.model.layers:  # type: ignore[union-attr]
        mark(layer.self_attn, "attention")
        mark(layer.mlp, "feed-forward")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (shape.tokens // SEQUENCE, SEQUENCE), generator=generator)
    positions, labels = torch.arange(SEQUENCE).expand_as(ids), ids.roll(-1, dims=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss = next_token_loss(model, ids, positions, labels) / ids.numel()
        loss.backward()
        with record_function("part/clipping"):
            clip_gradients(model, 1.0)
        with record_function("part/AdamW"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def chain(event: Any) -> list[Any]:
    """The event and all that it is inside of, innermost first."""
    events = []
    while event is not None:
        events.append(event)
        event = event.cpu_parent
    return events


def marked(events: list[Any]) -> str | None:
    """The marked part that the innermost event is in."""
    return next((event.name.removeprefix("part/") for event in events if event.name.startswith("part/")), None)


def part_of(event: Any, by_sequence: dict[int, str]) -> str:
    """One of PARTS."""
    around = chain(event)
    names = [other.name for other in around]
    if any("LinearCrossEntropy" in name for name in names):
        return "LM head and loss"
    part = marked(around)
    if part is None:  # a backward operation has the number of its forward operation
        numbers = [other.sequence_nr for other in around if "Backward" in other.name]
        part = next((by_sequence[number] for number in numbers if number in by_sequence), None)
    if part != "feed-forward":
        return part or REST
    if any(name in MOVES for name in names):
        return "dispatch"
    in_experts = any("ExpertLoop" in name for name in names)
    if any(name in PRODUCTS for name in names):
        return "feed-forward products" if in_experts or not has_experts(by_sequence) else "router"
    return "feed-forward elementwise" if in_experts or not has_experts(by_sequence) else "router"


def has_experts(by_sequence: dict[int, str]) -> bool:
    """Whether it is the profile of a MoE model."""
    return -1 in by_sequence


def parts_of_step(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of one step by part, and `step` for all of it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        step()
        took = (time.perf_counter() - started) * 1e3
    events = [event for event in profiler.events() or () if event.device_type.name == "CPU"]
    by_sequence = {
        event.sequence_nr: part for event in events
        if event.sequence_nr >= 0 and "Backward" not in event.name and (part := marked(chain(event))) is not None
    }  # fmt: skip
    if any("ExpertLoop" in event.name for event in events):
        by_sequence[-1] = "feed-forward"
    parts = dict.fromkeys(PARTS, 0.0)
    for event in events:
        parts[part_of(event, by_sequence)] += event.self_cpu_time_total / 1e3
    parts["outside operations"] += took - sum(parts.values())
    return parts | {"step": took}


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 512), ("ff", 1408), ("experts", 8), ("k", 1), ("tokens", 2048), ("threads", 2),
                        ("repeat", 9)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    quiet_transformers()
    torch.set_num_threads(given.threads)
    shape = Shape(given.hidden, given.ff, given.experts, given.k, given.tokens)
    steps = {name: stepper(name, shape) for name in ("btx", "dense")}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for turn in range(given.repeat + 1):
        for name, step in steps.items():
            parts = parts_of_step(step)
            if turn:
                found[name].append(parts)
    medians = {
        name: {part: statistics.median(parts[part] for parts in turns) for part in (*PARTS, "step")}
        for name, turns in found.items()
    }
    ours, dense = medians["btx"], medians["dense"]
    print(f"{shape}, {given.threads} threads, medians of {given.repeat}\n")
    print("| part | btx, share of its step | dense, share of its step | btx / dense | share of the difference |")
    print("|---|---|---|---|---|")
    for part in (*PARTS, "step"):
        ratio = f"{ours[part] / dense[part]:.2f}" if dense[part] > 0.005 * dense["step"] else ""
        print(f"| {part} | {ours[part] / ours['step']:.1%} | {dense[part] / dense['step']:.1%} | {ratio} | "
              f"{(ours[part] - dense[part]) / (ours['step'] - dense['step']):.0%} |")
    print(f"\nbtx / dense in tokens/s: {dense['step'] / ours['step']:.2f}; without AdamW and clipping: "
          f"{without_update(dense) / without_update(ours):.2f}")


def without_update(parts: dict[str, float]) -> float:
    """Milliseconds of forward and backward pass."""
    return parts["step"] - parts["AdamW"] - parts["clipping"]


if __name__ == "__main__":
    main()
