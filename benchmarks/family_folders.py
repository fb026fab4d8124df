"""Pico MoE folders of every family, for `engines.py`: everything random, with a tokenizer.

    python benchmarks/family_folders.py FOLDER [--variants]        # from the repository's root

Writes FOLDER/<dense>-<moe>/ for every pair of `btx ls families` (with --variants FOLDER/<dense>-<moe>-<number>/ for
every configuration that tests/test_families.py knows), each mixed by `btx.mix` from a seed model and two
branches with other FF weights. Norms and biases are random too: at their defaults a wrong mapping looks right.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.test_families import FIRST, IDS, SIZES, VARIANTS, branch, make

from btx.data.tokenizer import train_tokenizer
from btx.mixing.mix import mix

VOCABULARY = 512
# Widths that other engines' kernels take; the tests' own are smaller.
WIDER = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 128, "eos_token_id": 0}
TEXTS = [f"The {number} words of sentence {number * 7} are here, as they were in 19{number}: def main({number})."
         for number in range(400)]  # fmt: skip


def main(folder: Path, chosen: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """Make them all, one after the other."""
    SIZES.update(WIDER)
    tokenizer = train_tokenizer(TEXTS, VOCABULARY)
    for name, (dense, config) in chosen.items():
        with tempfile.TemporaryDirectory() as parts:
            seed = make(Path(parts) / "seed", dense, config | {"head_dim": 32})
            tokenizer.save_pretrained(seed)
            experts = {expert: branch(seed, Path(parts) / expert, number) for number, expert in enumerate("ab")}
            for path in experts.values():
                tokenizer.save_pretrained(path)
            mix(seed, experts, folder / name)
        print(folder / name, flush=True)


if __name__ == "__main__":
    every = "--variants" in sys.argv
    named = zip(IDS, VARIANTS, strict=True) if every else ((f"{v[0]}-{v[1]}", v) for v in FIRST.values())
    main(Path(sys.argv[1]), {name: (dense, config) for name, (dense, _, config) in named})
