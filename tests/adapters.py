"""LoRA adapters as peft saves them, written without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION = ("self_attn.q_proj", "self_attn.o_proj")


def write_adapter(
    folder: Path, seed_model: Path, modules: tuple[str, ...] = FEED_FORWARD, *, noise_seed: int = 1, **config: Any
) -> Path:
    """An adapter of rank 4 (a `rank_pattern` is kept to) on some modules of both layers of a pico model."""
    shapes = {name: tensor.shape for name, tensor in load_file(seed_model / "model.safetensors").items()}
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(seed_model), "r": 4, "lora_alpha": 8, "bias": "none",
        "target_modules": [module.split(".")[-1] for module in modules], "task_type": "CAUSAL_LM",
    } | config  # fmt: skip
    torch.manual_seed(noise_seed)
    tensors = {}
    for layer in range(2):
        for module in modules:
            name = f"model.layers.{layer}.{module}"
            rows, columns = shapes[f"{name}.weight"]
            rank = config.get("rank_pattern", {}).get(module.split(".")[-1], config["r"])
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns) * 0.3
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank) * 0.3
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return folder
