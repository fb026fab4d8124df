"""What is the mixed model worth before any finetuning, by how its routers start?

    btx run corpora data.root=FOLDER --until train          # or demo: a run whose experts are trained
    python benchmarks/router_init.py runs/corpora

Mixes the run's experts once with every router initialisation and measures bits per byte of held-out text in every
domain, beside the seed model, each domain's own expert and the soup. Prints a table in Markdown; writes nothing into
the run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from btx.choices.router_inits import RouterInit
from btx.data.expert_text import text_from_run
from btx.data.held_out import Packed, held_out_documents, pack
from btx.evaluation.bits_per_byte import bits_per_byte
from btx.mixing.mix import mix, soup
from btx.models.device import measuring_place
from btx.models.placement import load_placed
from btx.run_folder.folder import RunFolder

INITIALISATIONS = {
    "random N(0, 0.02)": RouterInit("random", std=0.02),
    "zeros": RouterInit("zeros"),
    "hidden_mean": RouterInit("hidden_mean"),
    "ridge": RouterInit("ridge"),
}
ROUTER_TOKENS = 50_000
"""Tokens of every domain that hidden_mean and ridge look at: the recipe's default."""


def measure(path: Path, run: RunFolder, packed: dict[str, Packed]) -> dict[str, float]:
    """Domain → bits per byte of a model folder."""
    model = load_placed(path, measuring_place(run.recipe, print))
    return {domain: bits_per_byte(model, rows).bits_per_byte for domain, rows in packed.items()}


def line(name: str, found: dict[str, float], domains: list[str]) -> str:
    """A row of the table; the mean only of what is measured in every domain."""
    cells = [f"{found[domain]:.3f}" if domain in found else "" for domain in domains]
    mean = f"{sum(found.values()) / len(found):.3f}" if len(found) == len(domains) else ""
    return f"| {' | '.join([name, *cells, mean])} |"


def main() -> None:
    """Measure the fixed models, then mix and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder whose experts are trained")
    parser.add_argument("--tokens", type=int, default=40_000, help="held-out tokens a domain")
    given = parser.parse_args()
    run = RunFolder.open(given.run)
    recipe, length = run.recipe, run.recipe.data.sequence_length
    domains = list(recipe.data.domains)
    packed = {name: pack(held_out_documents(run.path, recipe, name, given.tokens), length) for name in domains}
    experts = {domain: run.model(f"train/{domain}") for domain in recipe.train.domains}
    print(f"| model | {' | '.join(domains)} | mean |\n|{'---|' * (len(domains) + 2)}")
    print(line("seed", measure(run.model("seed"), run, packed), domains))
    own = {name: measure(path, run, {name: packed[name]})[name] for name, path in experts.items()}
    print(line("own expert", own, domains), flush=True)
    generalist = recipe.mix.generalist
    with tempfile.TemporaryDirectory() as scratch:
        soup(run.model("seed"), experts, Path(scratch) / "soup", generalist=generalist)
        print(line("soup", measure(Path(scratch) / "soup", run, packed), domains), flush=True)
        for name, init in INITIALISATIONS.items():
            texts = text_from_run(run.path, recipe, tokens=ROUTER_TOKENS) if init.needs_text else None
            mix(run.model("seed"), experts, Path(scratch) / "moe", generalist=generalist, top_k=recipe.mix.top_k,
                router_init=init, texts=texts, rng_seed=recipe.rng_seed)  # fmt: skip
            print(line(f"mix, {name}", measure(Path(scratch) / "moe", run, packed), domains), flush=True)


if __name__ == "__main__":
    main()
