"""What costs a mixture bits behind a change of domain: its experts, or routers that still follow the old domain?

    python benchmarks/forced_routing.py runs/my
    python benchmarks/forced_routing.py runs/s/at_24/rng-* --models btx upcycling_cm

First halves of held-out documents of one domain, each followed by the second half of one of another, every ordered pair
of domains in turn. Bits per byte of the second halves, three times:

- *as it is*: behind the first half;
- *routed afresh*: the same, but every token of the second half goes to the experts, with the gates, that it has where
  the model reads the second half alone. Attention still sees the first half. What this saves is the routers' part;
- *alone*: nothing before it but the separator.

A dense model has no second column. Plain transformers, classes with a router called `gate` beside `experts` (Mixtral).
Of several runs: mean ± standard error over runs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from markdown_table import markdown_table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from btx.evaluation.aggregate import mean_and_stderr
from btx.evaluation.lag import Change, changing_documents
from btx.evaluation.mixed_set import texts_to_halve
from btx.models.loading import load_tokenizer
from btx.planning.models import model_stages
from btx.run_folder.folder import RunFolder

MODELS = ("btx", "upcycling_cm", "dense_cm")
COLUMNS = ("as it is", "routed afresh", "alone")

Decisions = list[tuple[Tensor, ...]]
"""What each router gives back, in layer order; every tensor has the tokens in front: (T, ...)."""


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a model, in layer order; none of a dense one."""
    return [module.gate for module in model.modules() if hasattr(module, "gate") and hasattr(module, "experts")]


@contextmanager
def recorded(model: nn.Module) -> Iterator[Decisions]:
    """Collects what the routers decide."""
    decisions: Decisions = []
    hooks = [router.register_forward_hook(lambda _module, _inputs, output: decisions.append(output))
             for router in routers(model)]  # fmt: skip
    try:
        yield decisions
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def forced(model: nn.Module, decisions: Decisions) -> Iterator[None]:
    """The last tokens of what the model reads are routed as `decisions` say: as many as these have."""

    def replaced(of_layer: tuple[Tensor, ...]) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            pairs = zip(output, of_layer, strict=True)
            return tuple(torch.cat([natural[: len(natural) - len(wanted)], wanted]) for natural, wanted in pairs)

        return hook

    hooks = [router.register_forward_hook(replaced(of_layer))
             for router, of_layer in zip(routers(model), decisions, strict=True)]  # fmt: skip
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def bits_behind(model: PreTrainedModel, tokens_T: Tensor, first: int) -> float:
    """Bits of the tokens from index `first` on, each given all tokens before it."""
    logits_TV = model(input_ids=tokens_T[None], use_cache=False).logits[0, first - 1 : -1].float()
    return nn.functional.cross_entropy(logits_TV, tokens_T[first:], reduction="sum").item() / math.log(2)


def bits_of(model: PreTrainedModel, change: Change) -> list[float | None]:
    """Bits of the text behind a change, in the order of `COLUMNS`."""
    tokens_T = torch.from_numpy(change.tokens)
    alone_T = torch.cat([tokens_T[:1], tokens_T[change.at :]])
    with recorded(model) as decisions:
        alone = bits_behind(model, alone_T, 1)
    as_it_is = bits_behind(model, tokens_T, change.at)
    if not decisions:
        return [as_it_is, None, alone]
    with forced(model, [tuple(output[1:] for output in of_layer) for of_layer in decisions]):
        return [as_it_is, bits_behind(model, tokens_T, change.at), alone]


def measure(run: RunFolder, models: Sequence[str], documents: int) -> dict[str, list[float | None]]:
    """Model → bits per byte, in the order of `COLUMNS`."""
    tokenizer, domains = load_tokenizer(run.model("seed")), list(run.recipe.data.domains)
    halves = math.ceil(2 * documents / len(domains))
    texts = texts_to_halve(run.path, run.recipe, tokenizer, domains, halves)
    changes = changing_documents({domains.index(name): of_it for name, of_it in texts.items()}, tokenizer, documents)
    size = sum(len(str(tokenizer.decode(change.tokens[change.at :].tolist())).encode()) for change in changes)
    measured = {}
    for name in models:
        folder = run.model(model_stages(run.recipe)[name])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        columns = zip(*(bits_of(model, change) for change in changes), strict=True)
        measured[name] = [None if None in column else math.fsum(column) / size for column in columns]
    return measured


def table(runs: Sequence[dict[str, list[float | None]]]) -> str:
    """The measures of several runs, in Markdown."""
    rows = []
    for name in runs[0]:
        rows.append([name])
        for column in zip(*(run[name] for run in runs), strict=True):
            mean, stderr = (None, None) if None in column else mean_and_stderr(column)
            rows[-1].append("" if mean is None else f"{mean:.3f}" + ("" if stderr is None else f" ± {stderr:.3f}"))
    return markdown_table(["model", *COLUMNS], rows)


def main() -> None:
    """Measure, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders that differ in their rng seed")
    parser.add_argument("--models", nargs="+", default=MODELS, help="of the runs' results")
    parser.add_argument("--documents", type=int, default=240)
    arguments = parser.parse_args()
    print(table([measure(RunFolder.open(path), arguments.models, arguments.documents) for path in arguments.runs]))


if __name__ == "__main__":
    main()
