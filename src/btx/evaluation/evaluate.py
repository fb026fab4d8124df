"""Measure models: bits per byte of held-out text in every domain, exact match in every task.

Bits per byte compares models with different tokenizers and is what training lowers. Every text byte of a document is
scored once; the separator in front of a document is context, its end-of-text token is not scored.

Shape letters: B batch, S sequence, N documents, R scored tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from btx.baselines.btm_model import load_model_or_btm
from btx.data.domains import Question
from btx.data.held_out import Packed, held_out_documents, pack
from btx.evaluation.harness import Harness
from btx.evaluation.harness_files import requests_of
from btx.evaluation.mixed_set import mixed_documents
from btx.evaluation.questions import read_questions
from btx.evaluation.tasks import exact_match
from btx.files import read_json, value_hash, write_json, write_sealed
from btx.models.device import device_and_type, measuring_place
from btx.models.loading import load_tokenizer
from btx.models.outputs import MICRO_BATCH_TOKENS, SideBySide, cost_of, token_nll
from btx.number_texts import score_text
from btx.reporting.shapes import ModelResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from btx.recipe.evaluate import Task
    from btx.recipe.schema import Recipe

Log = Callable[[str], None]

MEASURE_VERSION = 2
"""Goes into the key of kept results; raised whenever a number would come out differently, or is new."""


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
    """Measured hours of training behind it, stages that do not need each other side by side."""
    inputs: str
    """Hash of everything the model was made from: kept results are used again while it stays the same."""
    accounting: dict[str, Any] = field(default_factory=dict)
    """More of what it cost, for its row of the results (docs/baselines.md)."""


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
    document_bits: list[float]
    """Bits of each document: what models are compared by, document by document (`btx.evaluation.compare`)."""

    def as_json(self) -> dict[str, Any]:
        """The entry of results.json."""
        return {"bits_per_byte": self.bits_per_byte, "stderr": self.stderr, "tokens": self.tokens, "bytes": self.bytes}


def bits_per_byte(
    model: PreTrainedModel | SideBySide, packed: Packed, *, micro_batch_tokens: int = MICRO_BATCH_TOKENS
) -> BitsPerByte:
    """Σ nll / Σ bytes / ln 2 over all documents, with its standard error.

    Args:
        model: causal language model, on any device.
        packed: held-out documents as `btx.data.held_out.pack` lays them out.
        micro_batch_tokens: tokens a forward pass, at most (one row at least).
    """
    started = time.perf_counter()
    nll_N = torch.zeros(len(packed.bytes_N), dtype=torch.float64)
    for rows in packed.batches(micro_batch_tokens):
        nll_R = token_nll(model, rows)
        nll_N.index_add_(0, rows.document_ids_BS[rows.scored_BS], nll_R.double().cpu())
    bits_N = nll_N / math.log(2)
    value, stderr = ratio(bits_N, packed.bytes_N.double())
    return BitsPerByte(
        bits_per_byte=value, stderr=stderr, tokens=int(packed.scored_BS.sum()), bytes=int(packed.bytes_N.sum()),
        documents=len(nll_N), seconds=time.perf_counter() - started,
        document_bits=[round(bits, 4) for bits in bits_N.tolist()],
    )  # fmt: skip


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
    mixed: Packed | None
    """Documents that switch domain; None where the recipe wants none."""
    questions: dict[str, list[Question]]
    harness: Harness

    def key(self, entry: ModelEntry, recipe: Recipe) -> str:
        """Hash of everything that decides a model's numbers."""
        return value_hash({
            "version": MEASURE_VERSION,
            "model": entry.inputs,
            "arithmetic": [str(value) for value in device_and_type(recipe)],
            "domains": {name: packed.fingerprint() for name, packed in self.packed.items()},
            "mixed": self.mixed and self.mixed.fingerprint(),
            "tasks": {name: _asked(recipe.evaluate.tasks[name]) for name in self.questions},
            "questions": {name: [asdict(question) for question in asked] for name, asked in self.questions.items()},
            **({"harness": self.harness.fingerprint} if self.harness else {}),
        })  # fmt: skip

    def document_bytes(self) -> dict[str, Any]:
        """UTF-8 bytes of every document, laid out as the models' bits in documents.json."""
        sizes: dict[str, Any] = {"domains": {name: packed.bytes_N.tolist() for name, packed in self.packed.items()}}
        return sizes if self.mixed is None else sizes | {"mixed": self.mixed.bytes_N.tolist()}


def evaluate_models(
    run_folder: Path, recipe: Recipe, models: Mapping[str, ModelEntry], *, log: Log, folder: Path | None = None
) -> dict[str, Any]:
    """Measure every model on every domain, the mixed set and every task; write results.json.

    Beside it, documents.json holds the bits of every document and whether each answer was right, for every model:
    {"bytes": {"domains": {D: [...]}, "mixed": [...]}, "models": {NAME: {"domains": {D: [...]}, "mixed": [...],
    "tasks": {T: [0 or 1, ...]}}}}.

    A finished model is kept in models/ and not measured again while nothing behind its numbers changed, so a
    kill loses one model at most.

    Args:
        run_folder: holds the prepared data.
        recipe: the run's recipe.
        models: name, as it stands in the results → model.
        log: called with lines for the user.
        folder: results go here; default: `evaluate` in the run folder.

    Returns:
        The results, as written.

    Raises:
        DataError: held-out data or questions are missing or broken.
        CheckpointError: a model cannot be loaded.
        UserError: a task of lm-evaluation-harness cannot be measured here.
    """
    measures = _what_to_measure(run_folder, recipe, models)
    if measures.harness.note:
        log(measures.harness.note)
    folder = folder or run_folder / "evaluate"
    results: dict[str, Any] = {"models": {}}
    documents: dict[str, Any] = {"bytes": measures.document_bytes(), "models": {}}
    for name, entry in models.items():
        kept, key = folder / "models" / kept_file(name), measures.key(entry, recipe)
        record = read_json(kept, Kept)
        if record is None or record["key"] != key:
            record = {"key": key, **_measure(entry, recipe, measures, log)}
            write_sealed(kept, record)
            log(_summary(name, record["measured"]))
        else:
            log(f"{name}: measured before, kept")
        cost = {"flops": entry.flops, "tokens": entry.tokens, "hours": entry.hours} | entry.accounting
        results["models"][name] = record["measured"] | cost
        documents["models"][name] = record["documents"]
    write_json(folder / "documents.json", documents)
    write_json(folder / "results.json", results)
    return results


def _asked(task: Task) -> dict[str, Any]:
    """A task's settings as they go into a key; `chat`, younger than kept results, where it changes something."""
    return task.model_dump(mode="json", exclude=set() if task.chat else {"chat"})


class Kept(TypedDict):
    """A file in evaluate/models/."""

    key: str
    measured: ModelResult
    documents: dict[str, Any]


def kept_file(name: str) -> str:
    """File, in evaluate/models/, that keeps what was measured of a model."""
    return f"{name.replace('/', '__')}.json"


def _what_to_measure(run_folder: Path, recipe: Recipe, models: Mapping[str, ModelEntry]) -> _Measures:
    settings, length = recipe.evaluate, recipe.data.sequence_length
    packed = {
        domain: pack(held_out_documents(run_folder, recipe, domain, settings.tokens), length)
        for domain in recipe.data.domains
    }
    mixed = None
    if settings.mixed.documents:
        tokenizer = load_tokenizer(next(iter(models.values())).path)  # the seed model's: it made the token files
        mixed = pack(mixed_documents(run_folder, recipe, tokenizer), length)
    questions = {
        name: read_questions(task, rng_seed=recipe.rng_seed, root=recipe.data.root)
        for name, task in settings.tasks.items()
    }
    harness = Harness(requests_of(recipe), allow_code_execution=settings.harness.allow_code_execution)
    return _Measures(packed, mixed, questions, harness)


def _measure(entry: ModelEntry, recipe: Recipe, measures: _Measures, log: Log) -> dict[str, Any]:
    """`measured`: everything results.json says of a model except what it cost to train; `documents`: its part of
    documents.json."""
    answers = bool(measures.questions) or bool(measures.harness)
    model = load_model_or_btm(entry.path, measuring_place(recipe, log, answers=answers))
    tokenizer = load_tokenizer(entry.path)
    cost = cost_of(model)
    domains = {name: bits_per_byte(model, packed) for name, packed in measures.packed.items()}
    mixed = bits_per_byte(model, measures.mixed) if measures.mixed is not None else None
    tasks = {
        name: exact_match(model, tokenizer, questions, recipe.evaluate.tasks[name])
        for name, questions in measures.questions.items()
    }
    scores = measures.harness.measure(model, tokenizer)
    measured = {
        "domains": {name: found.as_json() for name, found in domains.items()},
        **({"mixed": mixed.as_json()} if mixed else {}),
        "tasks": {name: found.as_json() for name, found in (tasks | scores).items()},
        "mean_bits_per_byte": sum(found.bits_per_byte for found in domains.values()) / len(domains),
        "active_params": cost.active_params,
        "total_params": cost.total_params,
        "inference_flops_per_token": cost.inference_flops_per_token(recipe.data.sequence_length),
        "eval_tokens_per_s": round(
            sum(found.tokens for found in domains.values()) / sum(found.seconds for found in domains.values()), 1
        ),
    }
    documents = {
        "domains": {name: found.document_bits for name, found in domains.items()},
        **({"mixed": mixed.document_bits} if mixed else {}),
        "tasks": {name: [int(answer.correct) for answer in found.answers] for name, found in tasks.items()}
        | {name: score.correct for name, score in scores.items() if score.correct is not None},
    }
    return {"measured": measured, "documents": documents}


def _summary(name: str, measured: Mapping[str, Any]) -> str:
    """One line for the user."""
    parts = [f"{domain} {found['bits_per_byte']:.3f}" for domain, found in measured["domains"].items()]
    parts += [f"mixed {measured['mixed']['bits_per_byte']:.3f}"] if "mixed" in measured else []
    parts += [f"{task} {score_text(found)}" for task, found in measured["tasks"].items()]
    return f"{name}: mean {measured['mean_bits_per_byte']:.3f} bits per byte; {', '.join(parts)}"
