"""What running experts apart costs: with P at once, N experts take ceil(N / P) times one expert's time plus this.

    python benchmarks/asynchrony.py [--seconds 60] [--rounds 3] [--experts 1 2 4] [--jobs 1 2] [--output FILE]

Each measurement is a whole `btx run --until train` over data and a seed model that are there, its experts trained by
jobs in processes of their own (launch.kind: local), one thread each, equally long. Three figures:

- `ratio`: from the first expert's start to the last one's end, over ceil(N / P) times the same with one expert alone.
  It holds the machine's own share too: cores that share their memory or are busy elsewhere. Rounds take turns; medians.
- `ratio_here`: the same over ceil(N / P) times the mean of these very experts: for machines that are busy elsewhere.
- `waste`: the time in which a place was free though an expert waited for it, and the time until the last one's end
  was seen, over the whole: what btx itself adds. It is as good on a busy machine.

With --fail one expert more is killed at its start; it takes no time, and the others' must be what it is without it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from btx.errors import BtxError
from btx.recipe.loading import load_recipe
from btx.running.launchers import START, Handle
from btx.running.launchers.local import LocalLauncher
from btx.running.pipeline import run as run_recipe

SEQUENCE, BATCH, WORDS = 128, 2048, 500
"""Tokens a sequence and a step; words of a domain's text."""


@dataclass
class Clock:
    """When each expert's process began and ended, in seconds."""

    begun: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)


class TimedLauncher(LocalLauncher):
    """The local launcher, with a look at the clock."""

    clock = Clock()
    failing: str | None = None

    def submit(self, run: Path, stages: Sequence[str], log: Path, *, after: Sequence[Handle] = ()) -> Handle:
        """Start the job; a thread waits for its end."""
        name = stages[0]
        self.clock.begun[name] = time.perf_counter()
        handle = super().submit(run, stages, log, after=after)
        process = self._started[handle["pid"]].process
        if name == self.failing:
            process.kill()

        def wait() -> None:
            process.wait()
            self.clock.ended[name] = time.perf_counter()

        threading.Thread(target=wait, daemon=True).start()
        return handle


def write_recipe(folder: Path, experts: int) -> Path:
    """A recipe over made-up text, alike for every domain."""
    names = ["general", *(f"d{number}" for number in range(experts))]
    for number, name in enumerate(names):
        lines = [
            json.dumps({"text": " ".join(f"w{(i * i + i * k + (number + 7) * k * k) % WORDS}" for k in range(200))})
            for i in range(600)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    training = {"batch_tokens": BATCH, "micro_batch_tokens": BATCH, "warmup_steps": 2, "checkpoint_every": 100}
    recipe = {
        "name": "asynchrony", "device": "cpu",
        "data": {"sequence_length": SEQUENCE, "root": str(folder),
                 "domains": {name: f"{name}.jsonl" for name in names}},
        "seed_model": {
            "config": {"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 384,
                       "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": SEQUENCE},
            "tokenizer": {"vocab_size": 512, "train_bytes": 100_000},
            "train": {"tokens": BATCH * 4, "learning_rate": 1e-3, **training},
        },
        "train": {"domains": names[1:], "tokens": BATCH, "learning_rate": 1e-3,
                  **training},
        "finetune": {"tokens": BATCH * 4, "learning_rate": 1e-3, **training},
        "launch": {"threads": 1},
    }  # fmt: skip
    (path := folder / "recipe.yaml").write_text(json.dumps(recipe), "utf-8")
    return path


def train(recipe: Path, prepared: Path, experts: int, jobs: int, tokens: int, failing: str | None) -> Clock:
    """Train so many experts, so many at once, from a copy of a run folder that has data and seed model."""
    run = prepared.with_name("measured")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(prepared, run)
    domains = ",".join(f"d{number}" for number in range(experts))
    settings = [f"run={run}", f"train.domains=[{domains}]", f"train.tokens={tokens}", f"launch.jobs={jobs}"]
    clock = TimedLauncher.clock = Clock()
    TimedLauncher.failing = failing
    try:
        run_recipe(load_recipe(str(recipe), settings), until="train")
    except BtxError:
        if failing is None:
            raise
    seen = time.perf_counter()
    clock.ended["seen"] = seen
    return clock


def figures(clock: Clock, jobs: int) -> dict[str, Any]:
    """What one measurement says, in seconds."""
    begun, ended = clock.begun, {name: time for name, time in clock.ended.items() if name in clock.begun}
    free_since = sorted(ended.values())
    gaps = [start - free_since[number] for number, start in enumerate(sorted(begun.values())[jobs:])]
    whole = max(ended.values()) - min(begun.values())
    return {
        "whole_s": round(whole, 2),
        "experts_s": [round(ended[name] - begun[name], 2) for name in begun if name != TimedLauncher.failing],
        "gaps_s": [round(gap, 3) for gap in gaps],
        "waste": round((sum(gaps) / jobs + clock.ended["seen"] - max(ended.values())) / whole, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of one expert's training, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--fail", action="store_true", help="one expert more, which fails")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    START["local"] = TimedLauncher
    with tempfile.TemporaryDirectory(prefix="btx-asynchrony-") as name:
        folder = Path(name)
        recipe = write_recipe(folder, max(options.experts) + options.fail)
        prepared = folder / "prepared"
        run_recipe(load_recipe(str(recipe), [f"run={prepared}"]), until="seed")
        cases = [(jobs, experts) for jobs in options.jobs for experts in options.experts]
        tokens = BATCH * 20
        rate = tokens / _steady_s(recipe, prepared, tokens)
        tokens = BATCH * max(1, round(options.seconds * rate / BATCH))
        rows: list[dict[str, Any]] = []
        for _ in range(options.rounds):
            alone = None
            for jobs, experts in cases:
                failing = "train/d1" if options.fail and experts > 1 else None
                clock = train(recipe, prepared, experts + (failing is not None), jobs, tokens, failing)
                row = {"jobs": jobs, "experts": experts} | figures(clock, jobs)
                alone = alone or row["whole_s"]
                turns = math.ceil(experts / jobs)
                row["ratio"] = round(row["whole_s"] / alone / turns, 4)
                row["ratio_here"] = round(row["whole_s"] / statistics.mean(row["experts_s"]) / turns, 4)
                rows.append(row)
                print(json.dumps(row), flush=True)
    summary = [
        {"jobs": jobs, "experts": experts, "rounds": options.rounds, "failed_one": options.fail}
        | {figure: statistics.median(row[figure] for row in rows if (row["jobs"], row["experts"]) == (jobs, experts))
           for figure in ("whole_s", "ratio", "ratio_here", "waste")}
        for jobs, experts in cases
    ]  # fmt: skip
    print(json.dumps(summary, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps({"tokens": tokens, "measured": summary, "rounds": rows}, indent=1) + "\n")


def _steady_s(recipe: Path, prepared: Path, tokens: int) -> float:
    """Seconds that training some tokens takes, without a process's start."""
    train(recipe, prepared, 1, 1, tokens, None)
    return float(json.loads((prepared.with_name("measured") / "train" / "d0" / "done.json").read_text())["wall_s"])


if __name__ == "__main__":
    main()
