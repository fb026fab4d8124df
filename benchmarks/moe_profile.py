"""Where a training step's time goes, ours and the dense floor's: attention, matrix products of the feed-forward layers,
dispatch (sorting, gathering, adding up), router, LM head and loss, clipping, AdamW, everything else.

    python benchmarks/moe_profile.py [--hidden 512] [--ff 1408] [--experts 8] [--k 1] [--tokens 2048] [--threads 1]

Both models are those of benchmarks/moe.py and take turns; every tensor operation is timed and added to the part it
belongs to, forward and backward; medians over the repeats. With one thread the clock is the process's own CPU time,
which other work on the machine does not lengthen; with more it is wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from moe import SEQUENCE, VOCABULARY, Shape, build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from btx.models.loading import quiet_transformers
from btx.training.losses import next_token_loss
from btx.training.optimizer import clip_gradients

PARTS = ("attention", "feed-forward products", "feed-forward elementwise", "dispatch", "router", "LM head and loss",
         "clipping", "AdamW", "norms, residuals, embeddings")  # fmt: skip
REST = PARTS[-1]
PRODUCTS = {"mm", "addmm", "addmm_", "bmm"}
MOVES = {"index_select", "index", "index_put_", "argsort", "sort", "bincount", "_embedding_bag", "embedding_bag",
         "_embedding_bag_forward_only", "where", "arange", "floor_divide", "zeros", "new_zeros"}  # fmt: skip
DECIDES = {"_softmax", "_softmax_backward_data", "topk", "value_selecting_reduction_backward", "scatter", "t"}


class PartClock(TorchDispatchMode):
    """Times every tensor operation of a step and adds it to the part that is being worked on."""

    def __init__(self, now: Callable[[], float], *, experts: bool) -> None:
        super().__init__()
        self.now = now
        self.experts = experts
        self.around = REST
        """Part of what is in no marked module."""
        self.module: str | None = None
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = self.now()
        result = func(*args, **(kwargs or {}))
        self.seconds[self.part_of(func)] += self.now() - started
        return result

    def part_of(self, func: Any) -> str:
        """The part of an operation, called now."""
        name, _, overload = func.__name__.partition(".")
        if self.module != "feed-forward":
            return self.module or self.around
        if self.experts and (name in DECIDES or (name == "mm" and overload == "default")):
            return "router"  # the experts' products are written in place: mm.out
        if name in PRODUCTS:
            return "feed-forward products"
        return "dispatch" if self.experts and name in MOVES else "feed-forward elementwise"

    def mark(self, module: nn.Module, name: str) -> None:
        """What runs in `module`, forward or backward, belongs to the part `name`."""

        def now_in(part: str | None) -> Callable[..., None]:
            return lambda *ignored: setattr(self, "module", part)

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            x: Tensor = args[0] if args else kwargs["hidden_states"]
            x.register_hook(now_in(None))
            self.module = name

        def after(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            (result[0] if isinstance(result, tuple) else result).register_hook(now_in(name))
            self.module = None

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)


def stepper(name: str, shape: Shape, now: Callable[[], float]) -> Callable[[bool], dict[str, float]]:
    """The training step of benchmarks/moe.py; returns seconds of the `whole` and, if it is to be timed, by part."""
    model = build(name, shape, "cpu").train()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (shape.tokens // SEQUENCE, SEQUENCE), generator=generator)
    positions, labels = torch.arange(SEQUENCE).expand_as(ids), ids.roll(-1, dims=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    clock = PartClock(now, experts=name == "btx")

    def work_on(part: str) -> Callable[..., None]:
        return lambda *ignored: setattr(clock, "around", part)

    def head_follows(_: nn.Module, args: Any, result: Any) -> None:
        clock.around = "LM head and loss"
        result.last_hidden_state.register_hook(work_on(REST))

    decoder: Any = model
    decoder.model.register_forward_hook(head_follows)
    for layer in decoder.model.layers:
        clock.mark(layer.self_attn, "attention")
        clock.mark(layer.mlp, "feed-forward")

    def step(timed: bool) -> dict[str, float]:
        clock.seconds = dict.fromkeys(PARTS, 0.0)
        started = now()
        with clock if timed else contextlib.nullcontext():
            work_on(REST)()
            loss = next_token_loss(model, ids, positions, labels) / ids.numel()
            loss.backward()
            work_on("clipping")()
            clip_gradients(model, 1.0)
            work_on("AdamW")()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return clock.seconds | {"whole": now() - started}

    return step


def report(ours: dict[str, float], dense: dict[str, float]) -> str:
    """Markdown: shares of each step, and where the difference comes from."""
    mine, theirs = (sum(found[part] for part in PARTS) for found in (ours, dense))
    lines = ["| part | btx, share of its step | dense, share of its step | btx / dense | difference / dense step |",
             "|---|---|---|---|---|"]  # fmt: skip
    for part in PARTS:
        ratio = f"{ours[part] / dense[part]:.2f}" if dense[part] > 0.002 * theirs else ""
        lines.append(f"| {part} | {ours[part] / mine:.1%} | {dense[part] / theirs:.1%} | {ratio} | "
                     f"{(ours[part] - dense[part]) / theirs:+.1%} |")  # fmt: skip
    lines.append(f"| all | | | {mine / theirs:.2f} | {mine / theirs - 1:+.1%} |")
    update = ("AdamW", "clipping")
    without = [sum(found[part] for part in PARTS if part not in update) for found in (dense, ours)]
    lines.append(
        f"\nTokens/s, btx / dense: {theirs / mine:.2f}; without clipping and AdamW {without[0] / without[1]:.2f}; of "
        f"whole steps, with Python and the freeing of memory, {dense['whole'] / ours['whole']:.2f}"
    )
    return "\n".join(lines)


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 512), ("ff", 1408), ("experts", 8), ("k", 1), ("tokens", 2048), ("threads", 1),
                        ("repeat", 9)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    quiet_transformers()
    torch.set_num_threads(given.threads)
    shape = Shape(given.hidden, given.ff, given.experts, given.k, given.tokens)
    now = time.process_time if given.threads == 1 else time.perf_counter
    steps = {name: stepper(name, shape, now) for name in ("btx", "dense")}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for turn in range(given.repeat + 1):
        for name, step in steps.items():
            seconds = step(True) | {"whole": step(False)["whole"]}
            if turn:
                found[name].append(seconds)
    medians = {
        name: {part: statistics.median(seconds[part] for seconds in turns) for part in (*PARTS, "whole")}
        for name, turns in found.items()
    }
    print(f"{shape}, {given.threads} threads, medians of {given.repeat}\n\n{report(medians['btx'], medians['dense'])}")


if __name__ == "__main__":
    main()
