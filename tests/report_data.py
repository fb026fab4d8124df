"""Run folders for the report with plausible numbers, as many experts as wanted, and all that can be measured."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from btx.reporting.drawing import Chart

NAMES = ("math", "code", "law", "medicine", "chemistry", "history", "poetry")
CLASSES = ("word start", "word part", "number", "punctuation", "code symbol", "space", "line end", "other")


DRAW: dict[str, Callable[[Chart], Any]] = {"svg": Chart.svg, "png": Chart.png}


@contextmanager
def drawn_once() -> Iterator[None]:
    """Reports of tests differ in a number or two: a figure of the same values is drawn once, and is the same."""
    drawn: dict[bytes, Any] = {}

    def once(kind: str) -> Callable[[Chart], Any]:
        def get(chart: Chart) -> Any:
            key = pickle.dumps((kind, chart))
            if key not in drawn:
                drawn[key] = DRAW[kind](chart)
            return drawn[key]

        return get

    with pytest.MonkeyPatch.context() as patch:
        for kind in DRAW:
            patch.setattr(Chart, kind, once(kind))
        yield


def write(path: Path, content: Any) -> None:
    """A file with text, or with JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def full_run(run: Path, *, domains: int = 7, layers: int = 6, aligned: Sequence[str] = ("sft", "dpo")) -> Path:
    """A finished, aligned run of `domains` + 1 experts."""
    rng = random.Random(3)
    names = [*NAMES[:domains], "general"]
    experts = [*NAMES[:domains], "generalist"]
    trained = ", ".join(NAMES[:domains])
    write(run / "recipe.yaml", f"name: full\ndescription: Every view of the report.\ndata: {{general: general}}\n"
          f"train:\n  domains: [{trained}]\nmix: {{router: top_k, top_k: 2}}\n")  # fmt: skip
    write(run / "manifest.json", {"command": "btx run full", "versions": {"btx": "1"}, "recipe_sha256": "0" * 64})
    for number, domain in enumerate(NAMES[:domains]):
        lines = [json.dumps({"step": s, "tokens": s * 4096, "loss": 2 + number / 9 + math.exp(-s / 20)})
                 for s in range(1, 80)]  # fmt: skip
        write(run / "train" / domain / "metrics.jsonl", "\n".join(lines) + "\n")
        write(run / "train" / domain / "done.json", {"inputs": "a", "tokens": 323584, "flops": 2.4e12, "wall_s": 61.0})
    write(run / "evaluate" / "results.json", {"models": results(names, aligned, rng)})
    write(run / "analyze" / "routing.json", routing(names, experts, layers, rng))
    if aligned:
        write(run / "analyze" / "align.json", shift(names, layers, aligned))
    return run


def results(names: Sequence[str], aligned: Sequence[str], rng: random.Random) -> dict[str, Any]:
    """Models with bits per byte, scores and costs."""
    kinds = ["seed", *(f"expert/{name}" for name in names[:-1]), "soup", "mix", "btx", "dense_cm", "upcycling_cm"]
    seed = {name: rng.uniform(0.8, 2.2) for name in names}
    models = {}
    for number, kind in enumerate([*kinds, *aligned]):
        gain = {"seed": 0.0, "soup": 0.05, "mix": 0.08, "btx": 0.13, "sft": 0.1, "dpo": 0.09}.get(kind, 0.07)
        bits = {
            name: bpb * (1 - (0.2 if kind == f"expert/{name}" else gain if "/" not in kind else -0.03))
            for name, bpb in seed.items()
        }
        flops = (0.5 + number / 3) * 1e13
        score = min(1.0, 0.1 + 2 * gain + (0.3 if kind in aligned else 0.0))
        models[kind] = {
            "domains": {name: {"bits_per_byte": x, "stderr": 0.01} for name, x in bits.items()},
            "tasks": {"arithmetic": {"exact_match": score, "stderr": 0.02, "questions": 200, "examples": []}},
            "mean_bits_per_byte": sum(bits.values()) / len(bits),
            "flops": flops, "tokens": 1_900_000, "hours": 0.14, "machine_hours": 0.2,
            "active_params": 1_730_000, "total_params": 6_910_000, "peak_memory_bytes": 1_230_000_000,
            "inference_flops_per_token": 3.6e6,
            "predicted": {"tokens": 1_950_000, "flops": 1.1 * flops, "memory_bytes": 640e6, "machine_hours": 0.2},
            "matched": {"flops_ratio": 1.004, "hours_ratio": 0.98},
        }  # fmt: skip
    return models


def routing(names: Sequence[str], experts: Sequence[str], layers: int, rng: random.Random) -> dict[str, Any]:
    """routing.json with everything in it."""
    E = len(experts)
    load = {name: [_shares(E, rng, own, 1 + layer / 2) for layer in range(layers)] for own, name in enumerate(names)}
    pairs = list(itertools.combinations(experts, 2))
    return {
        "layers": layers,
        "experts": list(experts),
        "domains": {
            name: {
                "load": load[name],
                "pairs": {
                    "+".join(pair): [row[number] for row in rows]
                    for rows in [[_shares(len(pairs), rng, own % len(pairs), 1.0) for _ in range(layers)]]
                    for number, pair in enumerate(pairs)
                },
            }
            for own, name in enumerate(names)
        },
        "dead": [],
        "statistics": {
            "load": {name: [[_interval(share) for share in layer] for layer in rows] for name, rows in load.items()},
            "specialisation": [_interval(0.1 + 0.5 * layer / layers) for layer in range(layers)],
            "similarity": [[math.exp(-abs(a - b) / 2) for b in range(layers)] for a in range(layers)],
            "positions": {place: [_shares(E, rng, 0, 0.3) for _ in range(layers)] for place in ("0-15", "16-63")},
            "classes": {kind: [_shares(E, rng, i, 0.5) for _ in range(layers)] for i, kind in enumerate(CLASSES)},
        },
        "used_for": {
            expert: {
                "tokens": [(f" {expert[:3]}{n}", 0.9 - n / 30, 300 - n) for n in range(9)] + [("\n", 0.4, 88)],
                "classes": dict(zip(CLASSES, _shares(len(CLASSES), rng, own % 8, 0.6), strict=True)),
            }
            for own, expert in enumerate(experts)
        },
        "lag": {
            "positions": list(range(-16, 64)),
            "old": [0.45 if at < 0 else 0.1 + 0.35 * math.exp(-at / 6) for at in range(-16, 64)],
            "new": [0.1 if at < 0 else 0.45 - 0.35 * math.exp(-at / 6) for at in range(-16, 64)],
            "documents": 48,
        },
        "kept": [
            {
                "experts": list(experts[:count]),
                "domains": {name: 1.2 + own / 9 + own % 3 * math.exp(-count) for own, name in enumerate(names)},
                "mean": 1.5 + 0.5 * math.exp(-1.2 * count),
            }
            for count in range(E, 0, -1)
        ],
        "loads": {model: {name: [_shares(E, rng, own, strength)] * layers for own, name in enumerate(names)}
                  for model, strength in (("mix", 1.0), ("btx", 3.0))},
    }  # fmt: skip


def shift(names: Sequence[str], layers: int, aligned: Sequence[str]) -> dict[str, Any]:
    """align.json."""
    return {
        "before": "btx",
        "models": {
            model: {
                name: {
                    "moved": [0.02 + 0.03 * own + 0.01 * layer for layer in range(layers)],
                    "distance": [0.01 * (1 + own)] * layers,
                }
                for own, name in enumerate(names)
            }
            for model in aligned
        },
    }  # fmt: skip


def analysed_model(folder: Path, *, experts: int = 16, layers: int = 24) -> Path:
    """What `btx analyze MODEL --text ...` leaves: experts without names of domains, and no run."""
    rng, numbers = random.Random(5), [str(number) for number in range(experts)]
    found = routing(["a", "b", "c"], numbers, layers, rng)
    del found["loads"], found["lag"]
    write(folder / "routing.json", found | {"model": "some/Mixture-16x"})
    tokens = [" the", " sum", " of", "\n"] * 8
    row = [[[3, 9]] * layers, [[0.7, 0.3]] * layers]
    write(folder / "tokens.json", {"layers": layers, "experts": numbers, "examples": [
        {"domain": "a", "tokens": tokens, "experts": [row[0]] * 32, "gates": [row[1]] * 32}]})  # fmt: skip
    return folder


def _shares(count: int, rng: random.Random, own: int, strength: float) -> list[float]:
    weights = [rng.uniform(0.5, 1.0) + (strength if number == own else 0.0) for number in range(count)]
    return [weight / sum(weights) for weight in weights]


def _interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02}
