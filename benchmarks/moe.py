"""How fast the MoE layer trains and infers: btx, transformers' Mixtral with each experts implementation, and the
floor: a dense Llama whose feed-forward layers have the same active FLOPs (k·F wide).

    python benchmarks/moe.py [--hidden 128] [--experts 8] [--k 1] [--threads 1] [--repeat 5] [--output FILE]

A training step is that of `btx.training.loop`: forward, backward, clipping and AdamW over all parameters. The
candidates take turns, step by step, so that a machine that slows down slows all of them; medians. Peak memory is
measured before, each candidate in a process of its own. An implementation whose first step is 10 times slower than the
dense model's, or that would need more than MEMORY_LIMIT, is left out and named.

Rows of other shapes in the output file are kept, so that shapes can be measured one at a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from markdown_table import markdown_table
from torch import nn

from btx.models.loading import quiet_transformers
from btx.moe.layer import moe_blocks, swap_in_moe
from btx.moe.routing_metrics import RoutingMeter
from btx.training.losses import next_token_loss
from btx.training.optimizer import clip_gradients

VOCABULARY, SEQUENCE, LAYERS = 2048, 256, 2
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
KEYS = ("device", "hidden", "ff", "experts", "k", "tokens", "mode")
TOO_SLOW = 10.0
MEMORY_LIMIT = 6e9


@dataclass(frozen=True)
class Shape:
    """One line-up. `k` equal to `experts` is the soft router."""

    hidden: int
    ff: int
    experts: int
    k: int
    tokens: int
    growth: bool = False
    """Measured to see how the cost grows: btx and dense alone."""


CPU_SHAPES = [
    *(Shape(128, 384, experts, k, 2048) for experts, k in ((4, 1), (4, 2), (4, 4), (8, 1), (8, 2))),
    Shape(128, 384, 4, 2, 8192),
    *(Shape(256, 704, experts, k, 2048) for experts, k in ((4, 1), (4, 2), (4, 4), (8, 1), (8, 2))),
    Shape(256, 704, 8, 2, 4096),
    *(Shape(512, 1408, experts, k, 2048) for experts, k in ((4, 1), (4, 2), (4, 4), (8, 1), (8, 2))),
    *(Shape(128, 384, experts, 2, 4096, growth=True) for experts in (2, 4, 8, 16)),
    *(Shape(128, 384, 8, 2, tokens, growth=True) for tokens in (1024, 8192, 16384)),
]
GPU_SHAPES = [
    Shape(hidden, ff, experts, k, 16384)
    for hidden, ff in ((1024, 2816), (2048, 5632)) for experts, k in ((4, 2), (8, 1), (8, 2))
]  # fmt: skip


def build(name: str, shape: Shape, device: str) -> nn.Module:
    """The candidate `name`: float32 on a CPU; on a GPU float32 weights under bfloat16 autocast."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    heads = max(2, shape.hidden // 64)
    common: dict[str, Any] = {
        "hidden_size": shape.hidden, "num_hidden_layers": LAYERS, "num_attention_heads": heads,
        "num_key_value_heads": heads, "vocab_size": VOCABULARY, "max_position_embeddings": SEQUENCE,
        "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    model: Any
    if name == "dense":
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=shape.k * shape.ff, **common))
    else:
        model = MixtralForCausalLM(MixtralConfig(
            intermediate_size=shape.ff, num_local_experts=shape.experts, num_experts_per_tok=shape.k, **common
        ))  # fmt: skip
        for layer in model.model.layers:
            nn.init.normal_(layer.mlp.gate.weight, std=0.02)
        if name == "btx":
            swap_in_moe(model)
        else:
            model.set_experts_implementation(name.removeprefix("transformers-"))
    return model.to(device)


def stepper(model: nn.Module, shape: Shape, mode: str, device: str) -> Callable[[], None]:
    """One training step or one forward pass over `shape.tokens` tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (shape.tokens // SEQUENCE, SEQUENCE), generator=generator).to(device)
    positions, labels = torch.arange(SEQUENCE, device=device).expand_as(ids), ids.roll(-1, dims=1)
    model.train(mode == "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) if mode == "train" else None

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            if optimizer is None:
                with torch.inference_mode():
                    next_token_loss(model, ids, positions, labels)
            else:
                loss = next_token_loss(model, ids, positions, labels) / ids.numel()
        if optimizer is not None:
            loss.backward()
            clip_gradients(model, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def candidates(shape: Shape) -> Iterator[str]:
    """Names of what is compared at a shape; what would need too much memory is said and left out."""
    yield from ("btx", "dense")
    if shape.growth:
        return
    for implementation in IMPLEMENTATIONS:
        gathered = 4 * shape.tokens * shape.k * 3 * shape.hidden * shape.ff  # batched_mm: weights by token and expert
        if implementation == "batched_mm" and 2 * gathered > MEMORY_LIMIT:
            print(f"  transformers-batched_mm left out: {2 * gathered / 1e9:.0f} GB for gathered weights", flush=True)
            continue
        yield f"transformers-{implementation}"


def peak_mb(name: str, shape: Shape, mode: str, device: str) -> float:
    """Peak memory of two steps, model and optimiser included, in MB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step = stepper(build(name, shape, device), shape, mode, device)
        step(), step()
        return torch.cuda.max_memory_allocated() / 1e6
    context = multiprocessing.get_context("fork")  # before any parallel region has run in this process
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_measure_peak, args=(send, name, shape, mode))
    child.start()
    peak = receive.recv()
    child.join()
    return peak


def _measure_peak(send: Any, name: str, shape: Shape, mode: str) -> None:
    before = _status_kb("VmRSS")
    step = stepper(build(name, shape, "cpu"), shape, mode, "cpu")
    step(), step()
    send.send((_status_kb("VmHWM") - before) / 1e3)


def _status_kb(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def measure(shape: Shape, mode: str, device: str, repeat: int, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """One row a candidate: the median of `repeat` steps, the candidates taking turns."""
    steps = {name: stepper(build(name, shape, device), shape, mode, device) for name in peaks}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeat + 1):
        for name in list(steps):
            started = time.perf_counter()
            steps[name]()
            took = time.perf_counter() - started
            if turn:
                seconds[name].append(took)
            elif name == "dense":
                limit = TOO_SLOW * took
            elif name not in ("btx", "dense") and took > limit:
                print(f"  {name} left out in {mode}: {took / limit * TOO_SLOW:.0f} times slower than dense", flush=True)
                del steps[name]
    del steps
    gc.collect()
    facts = asdict(shape)
    facts.pop("growth")
    return [
        {"name": name, "device": device, **facts, "mode": mode,
         "tokens_per_s": round(shape.tokens / statistics.median(times), 1), "peak_mb": round(peaks[name], 1)}
        for name, times in seconds.items() if times
    ]  # fmt: skip


def metrics_share(shape: Shape, repeat: int) -> float:
    """Share of a training step that the live routing metrics take."""
    model = build("btx", shape, "cpu")
    step = stepper(model, shape, "train", "cpu")
    whole, metered = [], []
    for _ in range(repeat):
        started = time.perf_counter()
        step()
        whole.append(time.perf_counter() - started)
        routings = [block.routing for block in moe_blocks(model) if block.routing is not None]
        started = time.perf_counter()
        meter = RoutingMeter()
        meter.add(routings)
        meter.facts(meter.values())
        metered.append(time.perf_counter() - started)
    return statistics.median(metered) / statistics.median(whole)


def line_up(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row shares with those it is compared with."""
    return tuple(row[key] for key in KEYS)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: tokens per second, and each candidate as a multiple of dense."""
    lines = []
    for key in dict.fromkeys(map(line_up, rows)):
        speed = {row["name"]: row["tokens_per_s"] for row in rows if line_up(row) == key}
        others = {name.removeprefix("transformers-"): value for name, value in speed.items() if "transformers" in name}
        best = max(others, key=lambda name: others[name]) if others else None
        lines.append([
            *map(str, key), f"{speed['dense']:.0f}", f"{speed['btx'] / speed['dense']:.2f}",
            *([f"{others[best] / speed['dense']:.2f} ({best})", f"{speed['btx'] / others[best]:.2f}"] if best else
              ["", ""]),
        ])  # fmt: skip
    return markdown_table([*KEYS, "dense tokens/s", "btx / dense", "best transformers / dense", "btx / best"], lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("hidden", "experts", "k"):
        parser.add_argument(f"--{name}", type=int, help="only shapes with this number")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("moe.json"))
    arguments = parser.parse_args()
    quiet_transformers()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    line_ups = [("cpu", shape) for shape in CPU_SHAPES]
    if torch.cuda.is_available():
        line_ups += [("cuda", shape) for shape in GPU_SHAPES]
    wanted = {name: value for name in ("hidden", "experts", "k") if (value := getattr(arguments, name)) is not None}
    line_ups = [(d, shape) for d, shape in line_ups if wanted.items() <= asdict(shape).items()]
    peaks = {
        (device, shape, mode): {name: peak_mb(name, shape, mode, device) for name in candidates(shape)}
        for device, shape in line_ups for mode in (("train",) if shape.growth else ("train", "infer"))
    }  # fmt: skip
    print(f"{torch.get_num_threads()} CPU threads", flush=True)
    measured: list[dict[str, Any]] = []
    for (device, shape, mode), peak in peaks.items():
        measured += measure(shape, mode, device, arguments.repeat, peak)
        print(table(measured).splitlines()[-1], flush=True)
    rows = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    again = {line_up(row) for row in measured}
    rows = [row for row in rows if line_up(row) not in again]
    rows = sorted(rows + measured, key=lambda row: (row["device"], row["hidden"]))
    arguments.output.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(
        f"{table(measured)}\n\nlive routing metrics: "
        f"{metrics_share(Shape(128, 384, 4, 2, 4096), 15):.2%} of a training step (hidden 128, 4096 tokens)"
    )


if __name__ == "__main__":
    main()
