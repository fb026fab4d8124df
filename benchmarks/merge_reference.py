"""Do btx's merge methods agree with mergekit's? Both merge the same small models; every tensor is compared.

    python benchmarks/merge_reference.py --mergekit /tmp/venv-mergekit      # an environment with mergekit==0.1.5

DARE drops at random, so there is nothing to compare entry by entry; its tests are in tests/test_merge_methods.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from btx.choices.merges import MergeSettings
from btx.data.tokenizer import train_tokenizer
from btx.mixing.merge_methods import bind

NAMES = ("a", "b", "c")


def make_models(folder: Path) -> None:
    """A seed model and three branches with small changes, in float32."""
    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=96, vocab_size=320,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    for number, name in enumerate(("seed", *NAMES)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05 * bool(number))
        model.save_pretrained(folder / name)
        train_tokenizer(["some words for a tokenizer"] * 3, 300).save_pretrained(folder / name)


def recipes(folder: Path) -> list[tuple[str, MergeSettings, tuple[str, ...], dict[str, Any]]]:
    """(what it is called, our settings, the models we merge, mergekit's config) of every comparison."""

    def models(names: tuple[str, ...], **parameters: float) -> list[dict[str, Any]]:
        return [{"model": str(folder / name), "parameters": parameters} for name in names]

    seed, weights = str(folder / "seed"), {"a": 1.0, "b": 2.0, "c": 0.5}
    weighted = [{"model": str(folder / name), "parameters": {"weight": weight}} for name, weight in weights.items()]
    found: list[tuple[str, MergeSettings, tuple[str, ...], dict[str, Any]]] = [
        ("mean", MergeSettings(), NAMES, {"merge_method": "linear", "models": models(NAMES, weight=1.0)}),
        ("weighted", MergeSettings("weighted", weights=weights), NAMES, {"merge_method": "linear", "models": weighted}),
    ]
    for t in (0.3, 0.5):
        config = {"merge_method": "slerp", "base_model": str(folder / "a"), "models": models(("a", "b")),
                  "parameters": {"t": t}}  # fmt: skip
        found.append((f"slerp t={t}", MergeSettings("slerp", t=t), ("a", "b"), config))
    for density, scale in ((0.2, 1.0), (0.5, 0.7), (1.0, 1.0)):
        config = {"merge_method": "ties", "base_model": seed, "models": models(NAMES, weight=1.0, density=density),
                  "parameters": {"normalize": True, "lambda": scale}}  # fmt: skip
        settings = MergeSettings("ties", density=density, scale=scale)
        found.append((f"ties density={density} scale={scale}", settings, NAMES, config))
    return found


def theirs(mergekit: Path, config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """What mergekit makes of it."""
    file, out = folder / "config.yaml", folder / "out"
    file.write_text(json.dumps(config | {"dtype": "float32"}))
    subprocess.run(["rm", "-rf", str(out)], check=True)
    command = [str(mergekit / "bin" / "mergekit-yaml"), str(file), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


def main() -> None:
    """Print a line for every method: largest difference, and the share of entries that differ by more than 1e-5."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, default=Path("/tmp/venv-mergekit"))
    mergekit = parser.parse_args().mergekit
    if not (mergekit / "bin" / "mergekit-yaml").exists():
        raise SystemExit(f"no mergekit in {mergekit}; python -m venv {mergekit} and pip install mergekit==0.1.5 there")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        tensors = {each: load_file(folder / each / "model.safetensors") for each in ("seed", *NAMES)}
        for label, settings, members, config in recipes(folder):
            merge, other = bind(settings, members).function, theirs(mergekit, config, folder)
            worst, different, entries = 0.0, 0, 0
            for tensor, start in tensors["seed"].items():
                ours = merge([tensors[member][tensor] for member in members], start, tensor).float()
                gap = (ours - other[tensor]).abs()
                worst, entries = max(worst, float(gap.max())), entries + gap.numel()
                different += int((gap > 1e-5).sum())
            print(f"{label}: largest difference {worst:.1e}, {different} of {entries} entries differ by more than 1e-5")


if __name__ == "__main__":
    main()
