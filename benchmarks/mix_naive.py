"""The plain way to BTX, for the benchmark: from_pretrained, copy and average, save_pretrained.

    python benchmarks/mix_naive.py MODELS OUT EXPERT...

One expert model is in memory at a time beside the MoE model, and sums are kept in float32: as careful as a script of
this kind usually is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM


def main(models: Path, out: Path, experts: list[str]) -> None:
    """Mix `experts`, then the seed model, into `out`."""
    members = [*experts, "seed"]
    seed = AutoModelForCausalLM.from_pretrained(models / "seed", dtype=torch.bfloat16)
    wanted = {key: value for key, value in seed.config.to_dict().items() if key not in ("model_type", "architectures")}
    config = MixtralConfig(**wanted, num_local_experts=len(members), num_experts_per_tok=2)
    with torch.device("meta"):
        moe = MixtralForCausalLM(config)
    moe = moe.to(torch.bfloat16).to_empty(device="cpu")
    own = moe.state_dict()
    sums = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in seed.state_dict().items()
            if ".mlp." not in name}  # fmt: skip
    del seed
    for number, member in enumerate(members):
        state = AutoModelForCausalLM.from_pretrained(models / member, dtype=torch.bfloat16).state_dict()
        for name in sums:
            sums[name] += state[name].float()
        for layer in range(config.num_hidden_layers):
            block, dense = f"model.layers.{layer}.mlp.experts.", f"model.layers.{layer}.mlp."
            gate_up = torch.cat([state[f"{dense}gate_proj.weight"], state[f"{dense}up_proj.weight"]])
            own[f"{block}gate_up_proj"][number] = gate_up
            own[f"{block}down_proj"][number] = state[f"{dense}down_proj.weight"]
    for name, total in sums.items():
        own[name].copy_(total / len(members))
    for layer in range(config.num_hidden_layers):
        own[f"model.layers.{layer}.mlp.gate.weight"].normal_(std=0.02)
    moe.save_pretrained(out, max_shard_size="1GB")
    AutoTokenizer.from_pretrained(models / "seed").save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
