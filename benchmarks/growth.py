"""How time and files grow: every stage of a small run, with ten times as much of one thing.

    python benchmarks/growth.py            # all, about ten minutes
    python benchmarks/growth.py experts    # one of: experts, layers, documents, document, shards, sweep

Prints a table for LOG.md: seconds and kilobytes of JSON of each stage at 1x and 10x, and the exponents of the growth (1
is linear, 2 quadratic; what takes less than 0.2 s at 10x is left out).
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tests.pico_run import WORDS, write_pico_recipe

from btx.mixing.mix import mix
from btx.process import Interrupts
from btx.recipe.loading import load_recipe
from btx.run_folder.folder import RunFolder
from btx.stages.work import run_stages
from btx.sweeps.variants import plan_sweep

Costs = dict[str, tuple[float, float]]
"""What was made → (seconds, kilobytes of JSON)."""


def whole_run(folder: Path, *overrides: str) -> Costs:
    """Every stage of the pico run in this process; stages of one kind together."""
    run = RunFolder.create(load_recipe(str(write_pico_recipe(folder)), [f"data.root={folder}", f"run={folder}/run",
                                                                          *overrides]))  # fmt: skip
    costs: Costs = {"(graph and states)": (seconds(lambda: [run.state(stage) for stage in run.graph]), 0.0)}
    for stage in run.graph:
        spent = seconds(lambda stage=stage: run_stages(run, [stage.name], Interrupts(), lambda line: None))
        kind = stage.name.split("/")[0] + ("/..." if "/" in stage.name else "")
        before = costs.get(kind, (0.0, 0.0))
        costs[kind] = (before[0] + spent, before[1] + kilobytes(run.folder(stage.name)))
    return costs


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def kilobytes(folder: Path) -> float:
    """Kilobytes of JSON and HTML in a folder."""
    files = [file for suffix in ("json", "jsonl", "html") for file in folder.rglob(f"*.{suffix}")]
    return sum(file.stat().st_size for file in files if file.name != "tokenizer.json") / 1000


def write_domain(path: Path, number: int, documents: int = 240, words: int = 40) -> None:
    """A file of documents in words of its own."""
    own = [f"{word}{number}" for word in WORDS["tools"]]
    lines = (json.dumps({"text": " ".join(own[(i * i + i * k + k * k) % len(own)] for k in range(words)) + f" {i}"})
             for i in range(documents))  # fmt: skip
    path.write_text("".join(line + "\n" for line in lines), "utf-8")


def experts(folder: Path, times: int) -> Costs:
    """4 and 40 branches; evaluation measures every model in every domain, so it is quadratic by nature."""
    names = [f"domain{number}" for number in range(4 * times)]
    for number, name in enumerate(names):
        write_domain(folder / f"{name}.jsonl", number)
    domains = {name: f"{name}.jsonl" for name in names} | {"general": "general.jsonl"}
    return whole_run(folder, f"data.domains={json.dumps(domains)}", f"train.domains={json.dumps(names)}",
                     "train.tokens=512", "evaluate.tasks={}", "evaluate.tokens=100")  # fmt: skip


def layers(folder: Path, times: int) -> Costs:
    """2 and 20 layers."""
    return whole_run(folder, f"seed_model.config.num_hidden_layers={2 * times}")


def documents(folder: Path, times: int) -> Costs:
    """2,000 and 20,000 documents in a domain."""
    write_domain(folder / "many.jsonl", 0, 2000 * times)
    return whole_run(folder, "data.domains.tools=many.jsonl")


def document(folder: Path, times: int) -> Costs:
    """One document of 0.3 MB and of 3 MB among others, read by the tokenizer's training too."""
    write_domain(folder / "long.jsonl", 0, 240)
    with (folder / "long.jsonl").open("a") as file:
        file.write(json.dumps({"text": " ".join(f"word{i * i % 977}" for i in range(40_000 * times))}) + "\n")
    domains = {"birds": "birds.jsonl", "tools": "tools.jsonl", "general": "long.jsonl"}
    return whole_run(folder, f"data.domains={json.dumps(domains)}", "seed_model.tokenizer.train_bytes=10000000")


def shards(folder: Path, times: int) -> Costs:
    """Mixing 4 experts in 4 and 40 shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from btx.data.tokenizer import train_tokenizer

    config = LlamaConfig(hidden_size=64, num_hidden_layers=40, intermediate_size=96, vocab_size=320,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(
        folder / "seed", max_shard_size=f"{math.ceil(model.num_parameters() * 4 / 1000 / 4 / times)}KB"
    )
    train_tokenizer([" ".join(WORDS["birds"])], 320).save_pretrained(folder / "seed")
    made = seconds(lambda: mix(folder / "seed", {f"e{i}": folder / "seed" for i in range(4)}, folder / "moe"))
    return {"mix": (made, kilobytes(folder / "moe"))}


def sweep(folder: Path, times: int) -> Costs:
    """Planning a sweep of 10 and 100 variants."""
    recipe = str(write_pico_recipe(folder))
    values = ",".join(f"{1e-4 * (number + 1):.4g}" for number in range(10 * times))
    fixed = [f"data.root={folder}", f"run={folder}/sweep", f"finetune.learning_rate={values}"]
    return {"plan of the sweep": (seconds(lambda: plan_sweep(recipe, fixed, rng_seeds=3)), 0.0)}


DIMENSIONS = {"experts": experts, "layers": layers, "documents": documents, "document": document, "shards": shards,
              "sweep": sweep}  # fmt: skip


def measure(dimension: str) -> None:
    """Print a dimension's lines of the table."""
    both = []
    for times in (1, 10):
        with tempfile.TemporaryDirectory() as folder:
            both.append(DIMENSIONS[dimension](Path(folder), times))
    small, large = both
    for kind, (time_10, size_10) in large.items():
        time_1, size_1 = small.get(kind, (0.0, 0.0))
        grows = f"{math.log10(time_10 / time_1):.1f}" if time_1 and time_10 >= 0.2 else ""
        swells = f"{math.log10(size_10 / size_1):.1f}" if size_1 and size_10 >= 20 else ""
        if grows or swells:
            print(f"| {dimension} | {kind} | {time_1:.2f} | {time_10:.2f} | {grows} | {size_1:,.0f} | {size_10:,.0f} | "
                  f"{swells} |", flush=True)  # fmt: skip


def main() -> None:
    """Measure the dimensions that are named, or all."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        whole_run(Path(folder))  # imports
    print(
        "| ten times | stage | s | s at 10x | exponent | kB | kB at 10x | exponent |\n|---|---|---|---|---|---|---|---|"
    )
    for dimension in sys.argv[1:] or DIMENSIONS:
        measure(dimension)
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
