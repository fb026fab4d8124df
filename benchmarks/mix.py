"""How fast is `btx mix`, and how little memory does it need? Against the physical floor, mergekit and a plain script.

    python benchmarks/mix.py --folder /big/disk            # or: make bench-mix
    python benchmarks/mix.py --sizes 125m --rounds 3

Four expert models and their seed model of random bfloat16 weights are made on the spot (Llama; 125M and 1.1B
parameters, in several shards). In every round each contestant makes the same MoE model once:

    copy       the floor: read all inputs, write the output's bytes (cp), flush them to the disk
    btx        `btx mix --max-shard-size 1GB`, which flushes too
    mergekit   mergekit's linear merge of all five models, then mergekit-moe on top of it: together they are BTX
    naive      from_pretrained, copy and average, save_pretrained, one model after the other

Written to benchmarks/mix.json: {"name", "experts", "model", "wall_s", "peak_anonymous_mb", "bytes", ...}, the median
of the rounds each; `bytes` are the output's. Peak anonymous memory is sampled from /proc every 50 ms, over all
processes of a contestant. mergekit lives in its own environment (--mergekit); without it, it is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

SIZES: dict[str, dict[str, int]] = {
    "125m": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048, "num_attention_heads": 12,
             "num_key_value_heads": 12, "vocab_size": 32000},
    "1.1b": {"hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632, "num_attention_heads": 32,
             "num_key_value_heads": 4, "vocab_size": 32000},
    "2.1b": {"hidden_size": 2048, "num_hidden_layers": 44, "intermediate_size": 5632, "num_attention_heads": 32,
             "num_key_value_heads": 4, "vocab_size": 32000},
}  # fmt: skip
EXPERTS = ("math", "code", "wiki", "law")
SHARD_BYTES = {"125m": 100_000_000, "1.1b": 500_000_000, "2.1b": 1_000_000_000}
POOL_ELEMENTS = 2**25
NAIVE = Path(__file__).with_name("mix_naive.py")


def make_models(folder: Path, size: str) -> None:
    """The seed model and the experts, unless they are there."""
    for number, name in enumerate(("seed", *EXPERTS)):
        target = folder / name
        if (target / "done").exists():
            continue
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        _write_model(target, size, number)
        (target / "done").touch()


def _write_model(target: Path, size: str, rng_seed: int) -> None:
    """A Llama of random weights; every tensor is cut from one pool of normal numbers at a random place."""
    from btx.data.tokenizer import train_tokenizer

    shape = SIZES[size]
    generator = torch.Generator().manual_seed(rng_seed)
    pool = (torch.randn(POOL_ELEMENTS, generator=generator) * 0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, sizes in _tensors(shape).items():
        numel = sizes[0] * (sizes[1] if len(sizes) > 1 else 1)
        start = int(torch.randint(0, POOL_ELEMENTS, (), generator=generator))
        repeats = -(-(start + numel) // POOL_ELEMENTS)
        tensor = pool.repeat(repeats)[start : start + numel].view(sizes).clone()
        if sum(value.nbytes for value in shards[-1].values()) + tensor.nbytes > SHARD_BYTES[size]:
            _save(target, shards, last=False)
            shards.append({})
        shards[-1][name] = tensor
    _save(target, shards, last=True)
    config = shape | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
                      "torch_dtype": "bfloat16", "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
                      "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    (target / "config.json").write_text(json.dumps(config, indent=1))
    train_tokenizer(["a few words for a tokenizer"] * 3, 300).save_pretrained(target)


def _save(target: Path, shards: list[dict[str, Any]], *, last: bool) -> None:
    """Write the newest shard and forget its tensors; with the last one, name all and write the index."""
    number = len(shards) - 1
    save_file(shards[-1], target / f"part-{number}.safetensors", metadata={"format": "pt"})
    shards[-1] = dict.fromkeys(shards[-1], None)
    if last:
        weight_map = {}
        for k, names in enumerate(shards):
            file = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
            (target / f"part-{k}.safetensors").rename(target / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    D, F, V = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    KV = D // shape["num_attention_heads"] * shape["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D)}
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (rows, D) for name, rows in
                  (("q", D), ("k", KV), ("v", KV), ("o", D))}  # fmt: skip
        found |= {f"{prefix}mlp.{name}_proj.weight": (F, D) for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (D, F)
        found |= {f"{prefix}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (D,)}


def measure(commands: list[list[str]]) -> tuple[float, float]:
    """Wall seconds of commands one after the other, and the peak of their anonymous memory in MB (RssAnon, over a
    command's whole process tree)."""
    peak, started = 0, time.perf_counter()
    for command in commands:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   env=os.environ | {"HF_HUB_OFFLINE": "1"})  # fmt: skip
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                pids = [process.pid, *(child.pid for child in tree.children(recursive=True))]
            except psutil.Error:
                pids = [process.pid]
            peak = max(peak, sum(map(_anonymous_kb, pids)))
            time.sleep(0.05)
        if process.returncode:
            error = process.stderr.read().decode() if process.stderr else ""
            raise SystemExit(f"{' '.join(command)}\nfailed:\n{error[-3000:]}")
    return time.perf_counter() - started, peak * 1024 / 1e6


def _anonymous_kb(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
    except OSError:
        pass  # the process has just ended
    return 0


def commands_of(name: str, models: Path, out: Path, reference: Path, mergekit: Path | None) -> list[list[str]]:
    """What a contestant runs; its output goes to `out`."""
    if name == "btx":
        experts = [part for expert in EXPERTS for part in ("--expert", f"{expert}={models / expert}")]
        return [[sys.executable, "-m", "btx", "mix", "--seed-model", str(models / "seed"), *experts, "-o", str(out),
                 "--max-shard-size", "1GB"]]  # fmt: skip
    if name == "copy":
        return [["sh", "-c", f"cat {models}/*/*.safetensors > /dev/null && cp -r {reference} {out} && sync {out}/*"]]
    if name == "naive":
        return [[sys.executable, str(NAIVE), str(models), str(out), *EXPERTS]]
    assert mergekit is not None
    config = models / "mergekit"
    config.mkdir(exist_ok=True)
    every = ["seed", *EXPERTS]
    linear = {"merge_method": "linear", "dtype": "bfloat16", "parameters": {"normalize": True},
              "models": [{"model": str(models / each), "parameters": {"weight": 1.0}} for each in every]}  # fmt: skip
    moe = {"base_model": str(out) + "-mean", "gate_mode": "random", "dtype": "bfloat16", "experts_per_token": 2,
           "experts": [{"source_model": str(models / each), "positive_prompts": [each]} for each in (*EXPERTS, "seed")],
           }  # fmt: skip
    (config / "linear.yaml").write_text(json.dumps(linear))  # JSON is YAML
    (config / "moe.yaml").write_text(json.dumps(moe))
    return [
        [str(mergekit / "bin" / "mergekit-yaml"), str(config / "linear.yaml"), str(out) + "-mean"],
        [str(mergekit / "bin" / "mergekit-moe"), str(config / "moe.yaml"), str(out)],
    ]


def main() -> None:
    """Run the contest and write the results after every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/btx-bench-mix"), help="where models are made")
    parser.add_argument("--sizes", default="125m,1.1b")
    parser.add_argument("--names", default="btx,copy,mergekit,naive")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", type=Path, default=Path("/tmp/venv-mergekit"), help="its virtual environment")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("mix.json"))
    parser.add_argument("--keep", action="store_true", help="keep the models made")
    arguments = parser.parse_args()
    mergekit = arguments.mergekit if (arguments.mergekit / "bin" / "mergekit-moe").exists() else None
    names = [name for name in arguments.names.split(",") if name != "mergekit" or mergekit]
    if mergekit is None:
        print(f"mergekit: left out; python -m venv {arguments.mergekit} and pip install mergekit==0.1.5 there")
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for size in arguments.sizes.split(","):
        models = arguments.folder / size
        make_models(models, size)
        rows = contest(size, models, names, arguments.rounds, mergekit)
        results = [row for row in results if (row["model"], row["name"]) not in {(size, name) for name in names}] + rows
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        if not arguments.keep:
            shutil.rmtree(models)


def contest(size: str, models: Path, names: list[str], rounds: int, mergekit: Path | None) -> list[dict[str, Any]]:
    """All contestants of one size in every round; the median of each."""
    reference, out = models / "reference", models / "out"
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    sizes: dict[str, int] = {}
    if not reference.exists():
        measure(commands_of("btx", models, reference, reference, mergekit))
    for number in range(rounds):
        for name in names:
            needed = 2.6 * sum(file.stat().st_size for file in (models / "seed").glob("*.safetensors")) * len(EXPERTS)
            if name == "naive" and psutil.virtual_memory().available < needed / 2:
                print(f"{size} naive: left out; {psutil.virtual_memory().available / 1e9:.0f} GB of memory are too few")
                continue
            measured[name].append(measure(commands_of(name, models, out, reference, mergekit)))
            sizes[name] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            print(f"{size} round {number + 1} {name}: {measured[name][-1][0]:.1f} s, "
                  f"{measured[name][-1][1]:.0f} MB anonymous", flush=True)  # fmt: skip
            for left_over in models.glob("out*"):
                shutil.rmtree(left_over)
    return [
        {
            "name": name, "experts": len(EXPERTS), "model": size,
            "wall_s": round(statistics.median(wall for wall, _ in runs), 2),
            "peak_anonymous_mb": round(statistics.median(peak for _, peak in runs), 1),
            "bytes": sizes[name], "rounds": len(runs), "walls_s": [round(wall, 2) for wall, _ in runs],
            "processors": os.cpu_count(),
        }
        for name, runs in measured.items() if runs
    ]  # fmt: skip


if __name__ == "__main__":
    main()
