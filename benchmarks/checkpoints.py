"""What a checkpoint costs training: saved in the background, as btx does it, and as before, with training waiting.

    python benchmarks/checkpoints.py [--hidden 768] [--layers 8] [--vocabulary 8192] [--sequence 256] [--samples 1]
        [--steps 4] [--rounds 5] [--threads 1] [--device auto] [--folder .] [--output FILE]

On a GPU: --hidden 2048 --layers 16 --vocabulary 128256 --sequence 4096 --samples 8 --steps 20 --rounds 2

A round is some steps of `btx.training.step` after a save, and ends when the checkpoint is on the disk: without a save,
with training waiting as before (safetensors writes, the file is read again for its SHA-256 and flushed), with training
waiting but hashed as it is written (one pass), and in the background. Rounds take turns, so that a machine that slows
down slows all of them; medians. What a checkpoint costs is how much longer a round takes than one without a save: the
stall, and what writing takes from the steps beside it. The first save allocates the copy and is told apart. A GPU
copies when its queue gets there, so there the stall shows in the cost alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from btx.files import atomic_folder, file_sha256
from btx.models.device import choose_device
from btx.planning.speed import RandomSamples
from btx.recipe.training import Training
from btx.training.checkpoints import Checkpoints
from btx.training.job import TrainingJob
from btx.training.optimizer import adamw, kept_tensors
from btx.training.state import StateFolder
from btx.training.step import training_step

EVERY = 100


def waiting_save(folder: Path, tensors: dict[str, Tensor]) -> None:
    """A checkpoint as btx wrote it until 0.3: training goes on when it is on the disk."""
    with atomic_folder(folder / "waiting") as target:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, target / "all")
        file_sha256(target / "all")


def one_pass_save(checkpoints: StateFolder, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As in the background, but waited for."""
    checkpoints.save(step, model, optimizer)
    checkpoints.last()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of rounds, stalls and steps."""
    device = choose_device(options.device)
    heads, ff = options.hidden // 64, options.hidden * 8 // 3 // 8 * 8
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=options.hidden, intermediate_size=ff, num_hidden_layers=options.layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=options.vocabulary, tie_word_embeddings=True,
    )).to(device)  # fmt: skip
    settings = Training(tokens=10**9, learning_rate=1e-4, micro_batch_tokens=8192, precision="bfloat16")
    job = TrainingJob(
        model=model, mixture=RandomSamples(options.vocabulary, options.sequence), settings=settings, folder=folder,
        checkpoints=Checkpoints(), flops_per_token=0.0, rng_seed=0, device=device,
    )  # fmt: skip
    optimizer = adamw(model, settings)
    checkpoints = StateFolder(folder / "state", {}, device=device.type, log=print)
    step = 0

    def steps() -> None:
        nonlocal step
        for _ in range(options.steps):
            step += 1
            training_step(job, optimizer, step, options.samples)
        if device.type == "cuda":
            torch.cuda.synchronize()

    steps()  # allocates
    weights, moments = kept_tensors(model, optimizer)
    saves: dict[str, Callable[[], None]] = {
        "none": lambda: None,
        "waiting": partial(
            waiting_save, folder, {**weights, **{f"m/{name}": value for name, value in moments.items()}}
        ),
        "one_pass": lambda: one_pass_save(checkpoints, step, model, optimizer),
        "background": lambda: checkpoints.save(step, model, optimizer),
    }
    rounds: dict[str, list[float]] = {name: [] for name in saves}
    stalls: dict[str, list[float]] = {name: [] for name in saves}
    beside: dict[str, list[float]] = {name: [] for name in saves}
    for _ in range(options.rounds + 1):
        for name, save in saves.items():
            started = time.perf_counter()
            save()
            stalls[name].append(time.perf_counter() - started)
            steps()
            beside[name].append(time.perf_counter() - started - stalls[name][-1])
            checkpoints.last()  # waits
            rounds[name].append(time.perf_counter() - started)
    whole = {name: median(seconds[1:]) for name, seconds in rounds.items()}
    per_step = whole["none"] / options.steps
    cost = {name: whole[name] - whole["none"] for name in saves if name != "none"}
    return {
        "device": str(device), "threads": torch.get_num_threads(), "steps": options.steps,
        "tokens_per_step": options.samples * options.sequence,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "checkpoint_bytes": sum(tensor.nbytes for tensor in (*weights.values(), *moments.values())),
        "step_s": per_step,
        **{f"{name}_stall_s": median(stalls[name][1:]) for name in cost},
        "background_first_stall_s": stalls["background"][0],
        "background_steps_slowed": median(beside["background"][1:]) / whole["none"],
        **{f"{name}_cost_s": seconds for name, seconds in cost.items()},
        "cost_ratio": cost["background"] / cost["waiting"],
        **{f"{name}_share_at_every_{EVERY}": seconds / (EVERY * per_step) for name, seconds in cost.items()},
    }  # fmt: skip


def main() -> None:
    """Measure and print; with --output write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"hidden": 768, "layers": 8, "vocabulary": 8192, "sequence": 256, "samples": 1, "steps": 4, "rounds": 5,
               "threads": 1}  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="where checkpoints are written: the disk to measure"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        text = json.dumps(measure(options, Path(folder)), indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
