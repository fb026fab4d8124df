"""Measure models: bits per byte of held-out text in every domain, exact match in every task.

Bits per byte compares models with different tokenizers and is what training lowers. Every text byte of a document is
scored once; the separator in front of a document is context, its end-of-text token is not scored.

Shape letters: B batch, S sequence, N documents, R scored tokens, D model, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from btx.cost import model_cost
from btx.domains import Question
from btx.folders import read_json, value_hash, write_json
from btx.harness import Harness
from btx.harness_files import requests_of
from btx.held_out import Packed, device_and_type, held_out_documents, load_to_measure, pack
from btx.models import load_tokenizer
from btx.report_results import score_text
from btx.tasks import exact_match, read_questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from btx.recipe import Recipe

Log = Callable[[str], None]

MICRO_BATCH_TOKENS = 8192
"""Tokens a forward pass."""
LOGITS_AT_ONCE = 2**25
"""Logits held in float32 at once: 128 MiB, whatever the vocabulary."""
MEASURE_VERSION = 1
"""Goes into the key of kept results; raised whenever a number would come out differently."""


@dataclass(frozen=True)
class ModelEntry:
    """A model to evaluate, with what it cost to make."""

    path: Path
    """Model folder."""
    tokens: int
    """Training tokens behind it, over all stages after the seed model."""
    flops: float
    """Training FLOPs behind it."""
    hours: float
    """Measured hours of training behind it."""
    inputs: str
    """Hash of everything the model was made from: kept results are used again while it stays the same."""


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte of one model on one domain."""

    bits_per_byte: float
    stderr: float | None
    """Standard error over documents; None with a single document."""
    tokens: int
    """Scored tokens."""
    bytes: int
    """UTF-8 bytes of the scored text."""
    documents: int
    seconds: float
    """Wall seconds of the forward passes."""


def bits_per_byte(
    model: PreTrainedModel, packed: Packed, *, micro_batch_tokens: int = MICRO_BATCH_TOKENS
) -> BitsPerByte:
    """Σ nll / Σ bytes / ln 2 over all documents, with its standard error.

    Args:
        model: causal language model, on any device.
        packed: held-out documents as `btx.held_out.pack` lays them out.
        micro_batch_tokens: tokens a forward pass, at most (one row at least).
    """
    started = time.perf_counter()
    nll_N = torch.zeros(len(packed.bytes_N), dtype=torch.float64)
    for rows in packed.batches(micro_batch_tokens):
        nll_R = token_nll(model, rows)
        nll_N.index_add_(0, rows.document_ids_BS[rows.scored_BS], nll_R.double().cpu())
    value, stderr = ratio(nll_N / math.log(2), packed.bytes_N.double())
    return BitsPerByte(
        bits_per_byte=value, stderr=stderr, tokens=int(packed.scored_BS.sum()), bytes=int(packed.bytes_N.sum()),
        documents=len(nll_N), seconds=time.perf_counter() - started,
    )  # fmt: skip


@torch.inference_mode()
def token_nll(model: PreTrainedModel, rows: Packed) -> Tensor:
    """Negative log-likelihood in nats of every scored token, in row order: (R,), float32.

    The head runs on slices of the scored positions, so that logits never exist for all tokens at once.
    """
    device = model.device
    hidden_BSD = model.base_model(
        input_ids=rows.input_ids_BS.to(device), position_ids=rows.position_ids_BS.to(device), use_cache=False
    ).last_hidden_state
    hidden_RD = hidden_BSD[rows.scored_BS.to(device)]
    labels_R = rows.labels_BS[rows.scored_BS].to(device)
    head = cast(torch.nn.Module, model.get_output_embeddings())
    slices = max(1, LOGITS_AT_ONCE // cast(int, model.config.vocab_size))
    return torch.cat([
        F.cross_entropy(head(hidden).float(), labels, reduction="none")
        for hidden, labels in zip(hidden_RD.split(slices), labels_R.split(slices), strict=True)
    ])  # fmt: skip


def ratio(value_N: Tensor, size_N: Tensor) -> tuple[float, float | None]:
    """Ratio estimator Σ value / Σ size and its standard error over N documents (linearised; None for N = 1).

    Source: Cochran, Sampling Techniques (1977), section 6.4.
    """
    total, n = size_N.sum(), len(size_N)
    estimate = value_N.sum() / total
    if n == 1:
        return float(estimate), None
    residual_N = value_N - estimate * size_N
    return float(estimate), float((residual_N.square().sum() * n / (n - 1)).sqrt() / total)


@dataclass(frozen=True)
class _Measures:
    """What every model of a run is measured on: the same rows and questions for all."""

    packed: dict[str, Packed]
    questions: dict[str, list[Question]]
    harness: Harness

    def key(self, entry: ModelEntry, recipe: Recipe) -> str:
        """Hash of everything that decides a model's numbers."""
        return value_hash({
            "version": MEASURE_VERSION,
            "model": entry.inputs,
            "arithmetic": [str(value) for value in device_and_type(recipe)],
            "domains": {name: packed.fingerprint() for name, packed in self.packed.items()},
            "tasks": {name: recipe.evaluate.tasks[name].model_dump(mode="json") for name in self.questions},
            "questions": {name: [asdict(question) for question in asked] for name, asked in self.questions.items()},
            **({"harness": self.harness.fingerprint} if self.harness else {}),
        })  # fmt: skip


def evaluate_models(run_folder: Path, recipe: Recipe, models: Mapping[str, ModelEntry], *, log: Log) -> dict[str, Any]:
    """Measure every model on every domain and task; write evaluate/results.json.

    A finished model is kept in evaluate/models/ and not measured again while nothing behind its numbers changed, so a
    kill loses one model at most.

    Args:
        run_folder: holds the prepared data; results go into its `evaluate` folder.
        recipe: the run's recipe.
        models: name, as it stands in the results → model.
        log: called with lines for the user.

    Returns:
        The results, as written.

    Raises:
        DataError: held-out data or questions are missing or broken.
        CheckpointError: a model cannot be loaded.
        UserError: a task of lm-evaluation-harness cannot be measured here.
    """
    root = Path(recipe.data.root or ".")
    measures = _Measures(
        packed={
            domain: pack(held_out_documents(run_folder, recipe, domain, recipe.evaluate.tokens),
                         recipe.data.sequence_length)
            for domain in recipe.data.domains
        },
        questions={
            name: read_questions(task, rng_seed=recipe.rng_seed, root=root)
            for name, task in recipe.evaluate.tasks.items()
        },
        harness=Harness(requests_of(recipe), allow_code_execution=recipe.evaluate.harness.allow_code_execution),
    )  # fmt: skip
    if measures.harness.note:
        log(measures.harness.note)
    folder = run_folder / "evaluate"
    results: dict[str, Any] = {"models": {}}
    for name, entry in models.items():
        kept, key = folder / "models" / f"{name.replace('/', '__')}.json", measures.key(entry, recipe)
        record = read_json(kept)
        if record is None or record["key"] != key:
            record = {"key": key, "measured": _measure(entry, recipe, measures)}
            write_json(kept, record)
            log(_summary(name, record["measured"]))
        else:
            log(f"{name}: measured before, kept")
        cost = {"flops": entry.flops, "tokens": entry.tokens, "hours": entry.hours}
        results["models"][name] = record["measured"] | cost
    write_json(folder / "results.json", results)
    return results


def _measure(entry: ModelEntry, recipe: Recipe, measures: _Measures) -> dict[str, Any]:
    """Everything results.json says of a model except what it cost to train."""
    model, tokenizer = load_to_measure(entry.path, recipe), load_tokenizer(entry.path)
    cost = model_cost(model)
    domains = {name: bits_per_byte(model, packed) for name, packed in measures.packed.items()}
    tasks = {
        name: exact_match(model, tokenizer, questions, recipe.evaluate.tasks[name]).as_json()
        for name, questions in measures.questions.items()
    }
    tasks |= {name: score.as_json() for name, score in measures.harness.measure(model, tokenizer).items()}
    return {
        "domains": {
            name: {"bits_per_byte": found.bits_per_byte, "stderr": found.stderr, "tokens": found.tokens,
                   "bytes": found.bytes}
            for name, found in domains.items()
        },
        "tasks": tasks,
        "mean_bits_per_byte": sum(found.bits_per_byte for found in domains.values()) / len(domains),
        "active_params": cost.active_params,
        "total_params": cost.total_params,
        "eval_tokens_per_s": round(
            sum(found.tokens for found in domains.values()) / sum(found.seconds for found in domains.values()), 1
        ),
    }  # fmt: skip


def _summary(name: str, measured: Mapping[str, Any]) -> str:
    """One line for the user."""
    parts = [f"{domain} {found['bits_per_byte']:.3f}" for domain, found in measured["domains"].items()]
    parts += [f"{task} {score_text(found)}" for task, found in measured["tasks"].items()]
    return f"{name}: mean {measured['mean_bits_per_byte']:.3f} bits per byte; {', '.join(parts)}"
