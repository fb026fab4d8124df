"""How well do a run's models read documents that change their subject, above all right after a change?

    python benchmarks/changing_subject.py ../shared/data -o changing.jsonl
    python benchmarks/changing_subject_bits.py changing.jsonl runs/my
    python benchmarks/changing_subject_bits.py changing.jsonl runs/s/plain/rng-* --against runs/s/switching/rng-*

Bits per byte of every model on whole documents, on the first 32 tokens after a change, on tokens 33 to 128 after it,
and on the rest, each token read as in the evaluation: with what is before it in its piece of `data.sequence_length`
tokens. A change counts where 16 tokens before it at least are in the piece; passages are tokenized apart, so that no
token lies across one.

Below, differences with their 95 % interval (paired bootstrap over documents): btx minus each other model, and with
`--against` every model there minus itself here (as many runs, of the same rng seeds in the same order, so that
documents have the same tokens). Of several runs bits and bytes are added up document by document; ± is the standard
error of the mean difference over runs.

`--routing` tells instead how btx of the first run routes around a change: the share of the load that the experts of the
old and of the new kind of text take, which is half at most with Top-2.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from markdown_table import markdown_table

from btx.baselines.btm_model import load_model_or_btm
from btx.data.held_out import HeldOutDocument
from btx.data.token_files import DocumentEncoder
from btx.evaluation.aggregate import mean_and_stderr
from btx.evaluation.bits_per_byte import token_bits
from btx.evaluation.lag import AFTER, BEFORE, DOCUMENTS, Change, lag
from btx.models.device import measuring_place
from btx.models.loading import load_tokenizer
from btx.planning.models import model_stages
from btx.reporting.paired_bootstrap import compare_documents
from btx.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from btx.models.outputs import SideBySide

MODELS = ("btx", "upcycling_cm", "dense_cm")
WHOLE = "whole documents"
SOON, LATER, REST = "first 32 tokens after a change", "tokens 33 to 128 after it", "the rest"
IN_SIGHT = 16
"""Tokens before a change that a model has to have read for it to count."""

EXPERTS = {"code": "code", "formula": "math", "prose": "generalist"}
"""Kind of text → the expert that it is for, by the names of the `results` recipe."""
BEFORE_CHANGE = 128
"""Tokens before a change that are read with it, at most."""

Sets = dict[str, list[float]]
"""Set of tokens → a number of each document."""


@dataclass(frozen=True)
class Changing:
    """A document that changes its subject, in tokens."""

    tokens: np.ndarray
    """As `HeldOutDocument.tokens`."""
    parts: list[tuple[frozenset[str], int, int]]
    """Stretches of its text tokens: the sets they are in, first token and end."""
    bytes: Counter[str]
    """UTF-8 bytes of each set."""


def in_tokens(line: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Changing:
    """A line of changing.jsonl as a run's models read it."""
    encoder = DocumentEncoder(tokenizer)
    ids = passage_ids(line, encoder)
    ends = np.cumsum([len(found) for found in ids])
    kinds = [kind for _, kind in line["passages"]]
    sets: list[frozenset[str]] = []
    for number, found in enumerate(ids):
        first = int(ends[number]) - len(found)
        for token in range(first, first + len(found)):
            # Pieces share a token, and a document's first token is its separator, which is no text.
            piece = token // (sequence_length - 1) * (sequence_length - 1)
            seen = number > 0 and first + 1 - piece >= IN_SIGHT
            sets.append(_sets(token - first if seen else math.inf, kinds[number - 1], kinds[number], line["domain"]))
    flat = np.array([encoder.separator, *(token for found in ids for token in found)], np.int64)
    parts, sizes, start = [], Counter[str](), 0
    for names, group in groupby(sets):
        end = start + len(list(group))
        parts.append((names, start, end))
        text = str(tokenizer.decode(flat[1 + start : 1 + end].tolist(), clean_up_tokenization_spaces=False))
        sizes.update(dict.fromkeys(names, len(text.encode())))
        start = end
    return Changing(flat, parts, sizes)


def passage_ids(line: Mapping[str, Any], encoder: DocumentEncoder) -> list[list[int]]:
    """Tokens of each passage, without separators."""
    starts = [start for start, _ in line["passages"]]
    texts = [line["text"][start:end] for start, end in pairwise([*starts, len(line["text"])])]
    return [found[1 : -1 if encoder.trailing_eos else None] for found in encoder(texts)]


def _sets(after: float, old: str, new: str, domain: str) -> frozenset[str]:
    """The sets of a token so many tokens after a change from one kind to another."""
    zone = SOON if after < 32 else LATER if after < 128 else REST
    of_change = {f"{SOON}, {old} to {new}", f"{SOON}, {domain}"} if zone == SOON else set[str]()
    return frozenset({WHOLE, f"{WHOLE}, {domain}", zone, *of_change})


def measure(run: RunFolder, lines: Sequence[Mapping[str, Any]], models: Sequence[str]) -> dict[str, Any]:
    """documents.json's shape of some models of a run, sets of tokens in place of domains."""
    length, stages = run.recipe.data.sequence_length, model_stages(run.recipe)
    tokenizer = load_tokenizer(run.model("seed"))
    documents = [in_tokens(line, tokenizer, length) for line in lines]
    names = sorted({name for document in documents for name in document.bytes})
    found: dict[str, Any] = {
        "bytes": {"domains": {name: [float(document.bytes[name]) for document in documents] for name in names}},
        "models": {},
    }
    for model in models:
        loaded = load_model_or_btm(run.model(stages[model]), measuring_place(run.recipe, print))
        sums = bits_of(loaded, documents, length)
        found["models"][model] = {"domains": sums, "tasks": {}}
        print(f"{run.path}: {model} {sum(sums[WHOLE]) / sum(found['bytes']['domains'][WHOLE]):.3f}", flush=True)
    return found


def bits_of(model: PreTrainedModel | SideBySide, documents: Sequence[Changing], sequence_length: int) -> Sets:
    """A model's bits on every set of each document."""
    bits = token_bits(model, [HeldOutDocument(document.tokens, 0) for document in documents], sequence_length)
    sums: Sets = {name: [0.0] * len(documents) for name in sorted({name for one in documents for name in one.bytes})}
    for number, (document, of_one) in enumerate(zip(documents, bits, strict=True)):
        for names, start, end in document.parts:
            for name in names:
                sums[name][number] += math.fsum(of_one[start:end])
    return sums


def changes_of(
    lines: Sequence[Mapping[str, Any]], encoder: DocumentEncoder, experts: Sequence[str]
) -> dict[str, list[Change]]:  # fmt: skip
    """Domain and direction → changes between kinds that have an expert, each with the last tokens before it."""
    own = {kind: experts.index(name) for kind, name in EXPERTS.items() if name in experts}
    changes: dict[str, list[Change]] = {}
    for line in lines:
        ids, kinds = passage_ids(line, encoder), [kind for _, kind in line["passages"]]
        for (before, old), (after, new) in pairwise(zip(ids, kinds, strict=True)):
            if old in own and new in own:
                seen = before[-BEFORE_CHANGE:]
                tokens = np.array([encoder.separator, *seen, *after[:AFTER]], np.int64)
                changes.setdefault(f"{line['domain']}, {old} to {new}", []).append(
                    Change(tokens, 1 + len(seen), own[old], own[new])
                )
    return changes


def routing_table(run: RunFolder, lines: Sequence[Mapping[str, Any]]) -> str:
    """Loads of the old and of the new kind's expert around changes, in Markdown; what changes seldom is left out."""
    changes = changes_of(lines, DocumentEncoder(load_tokenizer(run.model("seed"))), run.recipe.expert_names)
    model = cast("PreTrainedModel", load_model_or_btm(run.model("finetune"), measuring_place(run.recipe, print)))
    windows, rows = [(-BEFORE, 0), (0, 4), (4, 16), (16, 32), (32, AFTER)], []
    for name, found in changes.items():
        if len(found) >= DOCUMENTS // 2:
            loads = lag(model, found[:: -(-len(found) // DOCUMENTS)])
            cells = []
            for low, high in windows:
                inside = [at for at, position in enumerate(loads["positions"]) if low <= position < high]
                cells.append(" → ".join(f"{math.fsum(loads[key][at] for at in inside) / len(inside):.2f}"
                                        for key in ("old", "new")))  # fmt: skip
            rows.append([name, str(loads["documents"]), *cells])
    titles = [f"tokens {low} to {high - 1}: old → new" for low, high in windows]
    return markdown_table(["change", "changes", *titles], rows)


def added(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs' measures as one: bits and bytes added up document by document, for each set those that have it.
    Sets that not every run has are left out: tokenizers differ."""
    sizes = [run["bytes"]["domains"] for run in runs]
    names = [name for name in sizes[0] if all(sum(size.get(name, ())) for size in sizes)]
    there = {name: np.sum([size[name] for size in sizes], axis=0) > 0 for name in names}

    def total(parts: Sequence[Sets]) -> Sets:
        return {name: np.sum([part[name] for part in parts], axis=0)[has_it].tolist() for name, has_it in there.items()}

    return {
        "bytes": {"domains": total(sizes)},
        "models": {name: {"domains": total([run["models"][name]["domains"] for run in runs]), "tasks": {}}
                   for name in runs[0]["models"]},
    }  # fmt: skip


def bits_table(measured: Mapping[str, Any]) -> str:
    """Bits per byte of every model on every set, in Markdown."""
    models, sizes = measured["models"], measured["bytes"]["domains"]
    rows = []
    for name, size in _in_order(sizes):
        bits = [f"{sum(model['domains'][name]) / sum(size):.3f}" for model in models.values()]
        rows.append([name, f"{len(size)}", f"{sum(size):,.0f}", *bits])
    return markdown_table(["set", "documents", "bytes", *models], rows)


def differences_table(pairs: Mapping[str, Sequence[Pair]]) -> str:
    """Differences of two models' bits per byte on every set, in Markdown.

    Args:
        pairs: title → one pair a run.
    """
    cells: dict[str, list[str]] = {}
    for runs in pairs.values():
        first, second = added([pair.measured for pair in runs]), added([pair.other for pair in runs])
        both = compare_documents(first["models"][runs[0].model], second["models"][runs[0].other_model], first["bytes"])[
            "domains"
        ]
        for name, _ in _in_order(first["bytes"]["domains"]):
            mean, stderr = mean_and_stderr([pair.difference(name) for pair in runs])
            over_runs = "" if stderr is None else f" ± {stderr:.3f}"
            told = f"{mean:+.3f}{over_runs} ({both[name]['low']:+.3f} to {both[name]['high']:+.3f})"
            cells.setdefault(name, [name]).append(told.replace("-", "−"))
    return markdown_table(["set", *pairs], list(cells.values()))


@dataclass(frozen=True)
class Pair:
    """Two models of one run, or of two with the same documents."""

    measured: Mapping[str, Any]
    model: str
    other: Mapping[str, Any]
    other_model: str

    def difference(self, name: str) -> float:
        """Bits per byte of the first minus the second on one set."""
        bits = [math.fsum(measured["models"][model]["domains"][name])
                for measured, model in ((self.measured, self.model), (self.other, self.other_model))]  # fmt: skip
        return (bits[0] - bits[1]) / math.fsum(self.measured["bytes"]["domains"][name])


def _in_order(sizes: Sets) -> list[tuple[str, list[float]]]:
    """The four main sets, then their parts by name."""
    main = [WHOLE, SOON, LATER, REST]
    return [(name, sizes[name]) for name in [*main, *sorted(set(sizes) - set(main))] if sum(sizes.get(name, ()))]


def main() -> None:
    """Measure, then print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, help="what benchmarks/changing_subject.py has written")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders that differ in their rng seed")
    parser.add_argument("--against", type=Path, nargs="+", default=[], help="as many others, of the same rng seeds")
    parser.add_argument("--models", nargs="+", default=MODELS, help="of the runs' results, the first is compared")
    parser.add_argument("--routing", action="store_true", help="how btx of the first run routes, and nothing else")
    parser.add_argument("--documents-at-most", type=int, help="evenly spread; default: all")
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.documents.read_text("utf-8").split("\n") if line]
    lines = lines[:: max(1, len(lines) // (arguments.documents_at_most or len(lines)))]
    runs, against = ([RunFolder.open(path) for path in paths] for paths in (arguments.runs, arguments.against))
    if against and [run.recipe.rng_seed for run in runs] != [run.recipe.rng_seed for run in against]:
        parser.error("--against: needs as many runs, of the same rng seeds in the same order")
    if arguments.routing:
        print(routing_table(runs[0], lines))
        return
    models = list(arguments.models)
    measured, others = ([measure(run, lines, models) for run in group] for group in (runs, against))
    if any(one["bytes"] != other["bytes"] for one, other in zip(measured, others, strict=bool(others))):
        parser.error("--against: these runs have another tokenizer or sequence length")
    print(f"\n{len(lines)} documents, {len(runs)} runs\n\n{bits_table(added(measured))}\n")
    print(differences_table({f"{models[0]} − {model}": [Pair(one, models[0], one, model) for one in measured]
                             for model in models[1:]}))  # fmt: skip
    if others:
        print(f"\n--against\n\n{bits_table(added(others))}\n")
        print(differences_table({f"{model}, against − first": [Pair(other, model, one, model) for one, other in
                                 zip(measured, others, strict=True)] for model in models}))  # fmt: skip


if __name__ == "__main__":
    main()
