"""Host memory of one of several processes that share a model: loaded into shards, without and with adapters, drawn from
scratch, written, and loaded whole by each.

    python benchmarks/shards.py [--processes 4] [--hidden-size 1024] [--layers 12]

Prints, for the process that takes most, its peak above what it had before, as a multiple of the model's float32
weights. Files are in bfloat16, as most are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import distributed

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(key: str) -> int:
    """VmRSS, or VmHWM, its peak, in bytes; Linux only."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


class Peak:
    """Bytes above those at the start, at most."""

    def __enter__(self) -> Peak:
        CLEAR.write_text("5")  # the peak counts from now
        self._before = resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = resident("VmHWM") - self._before


def measure(rank: int, folder: Path, processes: int) -> None:
    """One process: what it takes, as JSON beside the model."""
    from btx.models.adapters import add_adapters, merge_adapters
    from btx.models.from_scratch import new_model
    from btx.models.loading import load_model, load_tokenizer, save_model
    from btx.models.sharded_loading import load_skeleton, share_out
    from btx.models.sharding import shard

    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), processes)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    found, host = {}, torch.device("cpu")
    share_out(load_skeleton(folder / "small"), folder / "small", host)  # what is imported there counts for nothing
    with Peak() as peak:
        model = load_skeleton(folder / "model")
        share_out(model, folder / "model", host)
    found["into shards"] = peak.bytes
    if rank == 0:
        (folder / "written").mkdir()
    with Peak() as peak:
        save_model(model, folder / "written", like=folder / "model", tokenizer=load_tokenizer(folder / "model"))
    found["written from shards"] = peak.bytes
    del model
    with Peak() as peak:
        model = load_skeleton(folder / "model")
        add_adapters(model, 16, 16.0, rng_seed=0)
        share_out(model, folder / "model", host)
    found["with adapters"] = peak.bytes
    with Peak() as peak:
        merge_adapters(model)
    found["adapters merged"] = peak.bytes
    del model
    config = json.loads((folder / "model" / "config.json").read_text())
    with Peak() as peak:
        share_out(new_model(config, rng_seed=0), None, host)
    found["from scratch"] = peak.bytes
    with Peak() as peak:
        shard(load_model(folder / "model"))
    found["whole by each"] = peak.bytes
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()


def main() -> None:
    """Make a model, start the processes, print."""
    from torch.multiprocessing import start_processes
    from transformers import LlamaConfig, LlamaForCausalLM

    from btx.data.tokenizer import train_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, layers, width in (("small", 1, 64), ("model", args.layers, args.hidden_size)):
            model = LlamaForCausalLM(LlamaConfig(
                hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, vocab_size=32_000,
                num_attention_heads=width // 64, num_key_value_heads=width // 64,
            ))  # fmt: skip
            model.bfloat16().save_pretrained(folder / kind)  # float32 would be mapped from the file where it is whole
            train_tokenizer(["a text of some words"] * 10, 300).save_pretrained(folder / kind)
        weights = sum(parameter.numel() for parameter in model.parameters())
        del model
        start_processes(measure, (folder, args.processes), args.processes, start_method="spawn")
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(args.processes)]
    print(f"{weights / 1e6:.0f}M weights, {4 * weights / 1e6:.0f} MB in float32, {args.processes} processes")
    for what in found[0]:
        most = max(each[what] for each in found)
        print(f"{what:20} {most / 1e6:6.0f} MB = {most / (4 * weights):.2f} of the model")


if __name__ == "__main__":
    main()
