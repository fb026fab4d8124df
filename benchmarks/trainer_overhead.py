"""What transformers.Trainer costs over a bare loop at the demo's size: hidden 128, 4 layers, 4096 tokens a step.

    python benchmarks/trainer_overhead.py [--threads 1]        (needs accelerate, which btx itself does not)

Same model, same loss (btx's), same fused AdamW, same batches; the two take turns, medians of tokens per second.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from btx.models.loading import quiet_transformers
from btx.training.losses import next_token_loss

SEQUENCE, ROWS, STEPS, TURNS = 256, 16, 15, 5


def model() -> LlamaForCausalLM:
    """The demo's dense model."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=128, num_hidden_layers=4, intermediate_size=384, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=2048, max_position_embeddings=512, tie_word_embeddings=True,
    ))  # fmt: skip


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random training sequences."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(2048, (STEPS * ROWS, SEQUENCE), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i].roll(-1), "position_ids": torch.arange(SEQUENCE)}


def loss_of(decoder: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean next-token loss."""
    summed = next_token_loss(decoder, batch["input_ids"], batch["position_ids"], batch["labels"])
    return summed / batch["labels"].numel()


class LossTrainer(Trainer):
    """Trainer with the same loss as the bare loop."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **ignored: Any) -> Any:
        return loss_of(model, inputs)


def bare(rows: Rows) -> float:
    """Seconds of STEPS steps of a bare loop, metrics read every step."""
    decoder = model().train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    started = time.perf_counter()
    for step in range(STEPS):
        items = [rows[i] for i in range(step * ROWS, (step + 1) * ROWS)]
        loss = loss_of(decoder, {key: torch.stack([item[key] for item in items]) for key in items[0]})
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    return time.perf_counter() - started


def trainer(rows: Rows) -> float:
    """Seconds of STEPS steps of transformers.Trainer, metrics logged every step."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=ROWS, max_steps=STEPS, learning_rate=1e-4, weight_decay=0.1,
            optim="adamw_torch_fused", max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, remove_unused_columns=False,
        )  # fmt: skip
        engine = LossTrainer(model=model(), args=arguments, train_dataset=rows)
        started = time.perf_counter()
        engine.train()
        return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    quiet_transformers()
    rows, seconds = Rows(), {"bare": [0.0] * 0, "Trainer": [0.0] * 0}
    for _ in range(TURNS + 1):
        seconds["bare"].append(bare(rows))
        seconds["Trainer"].append(trainer(rows))
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {STEPS * ROWS * SEQUENCE / median:.0f} tokens/s")
    print(f"Trainer's overhead: {medians['Trainer'] / medians['bare'] - 1:.1%}")


if __name__ == "__main__":
    main()
