"""The recipes at the size people have, for a few steps on a CPU: random weights of the real shape but for its depth.

    python benchmarks/real_shapes.py                               # all four, one after the other
    python benchmarks/real_shapes.py qwen3-0.6b --layers 2
    python benchmarks/real_shapes.py llama2-7b-paper --trainable routers  # what of the mixed model trains: memory
    python benchmarks/real_shapes.py llama3.2-1b launch.processes=2       # further overrides of the recipe

Hidden sizes, heads, rotations and vocabulary are those of the recipe's `plan_config`, and the run checks the folder
against it; text is generated, its tokenizer has 2,048 entries. Prints a line a recipe: parameters, losses of the first
and last step of every training, seconds, and the largest process's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from btx.data.tokenizer import train_tokenizer
from btx.recipe.loading import inline_yaml, load_recipe

RECIPES = ("smollm2-135m", "qwen3-0.6b", "llama3.2-1b", "llama2-7b-paper")
GENERATED = {"math": "math", "code": "code", "wiki": "knowledge", "general": "general"}
STAGES = ["data", "seed", "train", "mix", "finetune", "evaluate", "analyze", "report"]
STEPS, STEP_TOKENS = 3, 128
SETTINGS = [
    "device=cpu", "data.sequence_length=64", "train.domain_tokens={}", "mix.router_tokens=500",
    "evaluate.tokens=200", "evaluate.mixed=2", "analyze.tokens=200", "launch={jobs: 1}", "baselines=[]",
    *(f"{section}.{setting}" for section in ("train", "finetune") for setting in (
        f"tokens={STEPS * STEP_TOKENS}", f"batch_tokens={STEP_TOKENS}", f"micro_batch_tokens={STEP_TOKENS // 2}",
        "warmup_steps=1", "checkpoint_every=1000", "precision=auto")),
]  # fmt: skip


def random_model(recipe: str, layers: int, folder: Path) -> dict[str, object]:
    """Write a model folder of the shape the recipe plans with, but for its depth; returns its config."""
    planned = load_recipe(recipe).seed_model.plan_config
    assert planned is not None
    planned = planned | {"num_hidden_layers": layers}
    values = {key: value for key, value in planned.items() if key != "model_type"}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(planned["model_type"], **values, **ends), dtype=torch.bfloat16
    ).save_pretrained(folder)
    text = (Path(os.__file__).parent / name for name in ("argparse.py", "typing.py", "inspect.py", "doctest.py"))
    train_tokenizer([file.read_text("utf-8") for file in text], 2048).save_pretrained(folder)
    return planned


def tried(recipe: str, layers: int, overrides: list[str]) -> dict[str, object]:
    """Run a recipe whole, all stages in one process, and say what was seen."""
    with tempfile.TemporaryDirectory() as folder:
        model, run = Path(folder) / "model", Path(folder) / "run"
        planned = random_model(recipe, layers, model)
        domains = {name: {"generate": kind, "max_bytes": 150_000} for name, kind in GENERATED.items()}
        started = time.perf_counter()
        given = [recipe, f"run={run}", f"seed_model.path={model}", f"seed_model.plan_config={inline_yaml(planned)}",
                 f"data.domains={inline_yaml(domains)}", *SETTINGS, *overrides]  # fmt: skip
        for command in (["begin", *given], ["work", str(run), *STAGES]):
            done = subprocess.run([sys.executable, "-m", "btx", *command], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                sys.exit(f"{recipe}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        losses = {}
        for file in sorted(run.glob("**/metrics.jsonl")):
            steps = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            losses[str(file.parent.relative_to(run))] = [round(step["loss"], 3) for step in (steps[0], steps[-1])]
        models = json.loads((run / "evaluate" / "results.json").read_text("utf-8"))["models"]
    return {
        "recipe": recipe, "layers": layers, "seconds": round(time.perf_counter() - started),
        "parameters": models["seed"]["total_params"], "moe_parameters": models["btx"]["total_params"],
        "bits_per_byte": {name: round(models[name]["mean_bits_per_byte"], 3) for name in ("seed", "mix", "btx")},
        "losses": losses,
        "largest_process_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 1),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", choices=RECIPES)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--trainable", default="all_but_experts", help="finetune.trainable")
    given = parser.parse_intermixed_args()
    for name in [given.recipe] if given.recipe else RECIPES:
        print(json.dumps(tried(name, given.layers, [f"finetune.trainable={given.trainable}", *given.overrides])))
