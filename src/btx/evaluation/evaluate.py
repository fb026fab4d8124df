"""Measure models: bits per byte of held-out text in every domain, exact match in every task.

Beside the numbers, what the report shows of every model: `btx.evaluation.shown`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from typing_extensions import TypedDict  # pydantic wants it below Python 3.12

from btx.baselines.btm_model import load_model_or_btm
from btx.data.domains import Question
from btx.data.held_out import HeldOutDocument, Packed, held_out_documents, pack
from btx.errors import UserError
from btx.evaluation.any_model import keeps_apart
from btx.evaluation.bits_per_byte import bits_per_byte
from btx.evaluation.harness import Harness
from btx.evaluation.harness_files import requests_of
from btx.evaluation.mixed_set import mixed_documents
from btx.evaluation.other_tokenizer import in_tokens_of
from btx.evaluation.questions import read_questions
from btx.evaluation.shown import ToShow, to_show
from btx.evaluation.tasks import exact_match
from btx.files import read_json, value_hash, write_json, write_sealed
from btx.models.device import device_and_type, measuring_place
from btx.models.loading import load_tokenizer
from btx.models.outputs import SideBySide, cost_of
from btx.number_texts import score_text
from btx.process import Log
from btx.reporting.results import learning_and_keeping_means
from btx.reporting.shapes import ModelResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from btx.recipe.evaluate import Task
    from btx.recipe.schema import Recipe

MEASURE_VERSION = 2
"""Goes into the key of kept results; raised whenever a number would come out differently, or is new."""


@dataclass(frozen=True)
class ModelEntry:
    """A model to evaluate, with what it cost to make."""

    path: Path
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
class OtherEntry:
    """A model that the run has not made. Nothing is taken for granted of it: neither the tokenizer nor how it reads
    several texts in a row."""

    path: Path | str
    """Model folder or hub name."""
    inputs: str
    """Hash of what lies there."""


@dataclass(frozen=True)
class _Measures:
    """What every model of a run is measured on: the same rows and questions for all."""

    documents: dict[str, list[HeldOutDocument]]
    mixed_documents: list[HeldOutDocument]
    """Documents that switch domain; empty where the recipe wants none."""
    tokenizer: PreTrainedTokenizerBase
    """The one whose tokens they are."""
    length: int
    """Tokens that are read at once, at most."""
    apart: bool
    questions: dict[str, list[Question]]
    harness: Harness
    shown: ToShow

    @cached_property
    def packed(self) -> dict[str, Packed]:
        """Domain → rows."""
        return {name: pack(documents, self.length, apart=self.apart) for name, documents in self.documents.items()}

    @cached_property
    def mixed(self) -> Packed | None:
        """Rows of documents that switch domain."""
        return pack(self.mixed_documents, self.length, apart=self.apart) if self.mixed_documents else None

    def as_read_by(self, model: PreTrainedModel | SideBySide, theirs: PreTrainedTokenizerBase) -> _Measures:
        """The same text for a model that the run has not made."""
        read = {name: in_tokens_of(theirs, ours, self.tokenizer) for name, ours in self.documents.items()}
        same = all(new is old for name, documents in self.documents.items()
                   for new, old in zip(read[name], documents, strict=True))  # fmt: skip
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None) or self.length
        shown = replace(self.shown, only_named=True)
        shown = shown if same else replace(shown, examples={}, texts={})  # token by token nothing compares
        return replace(
            self, documents=read, mixed_documents=in_tokens_of(theirs, self.mixed_documents, self.tokenizer),
            length=min(self.length, longest), apart=not keeps_apart(model), shown=shown,
        )  # fmt: skip

    def key(self, entry: ModelEntry | OtherEntry, recipe: Recipe) -> str:
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
    run_folder: Path, recipe: Recipe, models: Mapping[str, ModelEntry | OtherEntry], *, log: Log,
    folder: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure every model on every domain, the mixed set and every task; write results.json.

    Beside it, documents.json holds the bits of every document and whether each answer was right, for every model:
    {"bytes": {"domains": {D: [...]}, "mixed": [...]}, "models": {NAME: {"domains": {D: [...]}, "mixed": [...],
    "tasks": {T: [0 or 1, ...]}}}}.

    What the report shows of every model besides, single tokens and answers, is in shown.json
    (`btx.reporting.shapes.Shown`).

    An `OtherEntry` has no tokens, FLOPs and hours, but `other`: {"path"}. If it cannot be measured, it is
    left out.

    A finished model is kept in models/ and not measured again while nothing behind its numbers changed, so a
    kill loses one model at most.

    Args:
        models: name, as it stands in the results → model.
        folder: results go here; default: `evaluate` in the run folder.

    Returns:
        The results, as written.
    """
    measures = _what_to_measure(run_folder, recipe, models)
    if measures.harness.note:
        log(measures.harness.note)
    folder = folder or run_folder / "evaluate"
    results: dict[str, Any] = {"models": {}}
    documents: dict[str, Any] = {"bytes": measures.document_bytes(), "models": {}}
    shown: dict[str, dict[str, Any]] = {}
    for name, entry in models.items():
        try:
            record = _record(name, entry, recipe, measures, folder / "models" / kept_file(name), log)
        except UserError as error:
            if isinstance(entry, ModelEntry):
                raise
            log(f"{name}: left out: {error}")
            continue
        parts = learning_and_keeping_means(record["measured"], recipe.train.domains)
        means = {f"{part}_bits_per_byte": mean for part, mean in parts.items()}
        results["models"][name] = record["measured"] | means | _cost(entry)
        documents["models"][name] = record["documents"]
        shown[name] = record["shown"]
    write_json(folder / "shown.json", measures.shown.together(shown))
    write_json(folder / "documents.json", documents)
    write_json(folder / "results.json", results)
    return results


def _asked(task: Task) -> dict[str, Any]:
    """A task's settings as they go into a key; `chat`, younger than kept results, where it changes something."""
    return task.model_dump(mode="json", exclude=set() if task.chat else {"chat"})


def _cost(entry: ModelEntry | OtherEntry) -> dict[str, Any]:
    """What results.json says of a model besides what was measured."""
    if isinstance(entry, OtherEntry):
        return {"flops": None, "tokens": None, "hours": None, "other": {"path": str(entry.path)}}
    return {"flops": entry.flops, "tokens": entry.tokens, "hours": entry.hours} | entry.accounting


class Kept(TypedDict):
    """A file in evaluate/models/."""

    key: str
    measured: ModelResult
    documents: dict[str, Any]
    shown: NotRequired[dict[str, Any]]
    """What `btx.evaluation.shown` keeps, with a key of its own: showing more measures nothing again."""


def kept_file(name: str) -> str:
    """File, in evaluate/models/, that keeps what was measured of a model."""
    return f"{name.replace('/', '__')}.json"


def _what_to_measure(run_folder: Path, recipe: Recipe, models: Mapping[str, ModelEntry | OtherEntry]) -> _Measures:
    settings = recipe.evaluate
    documents = {
        domain: held_out_documents(run_folder, recipe, domain, settings.tokens) for domain in recipe.data.domains
    }
    tokenizer = load_tokenizer(next(iter(models.values())).path)  # the seed model's: it made the token files
    mixed = mixed_documents(run_folder, recipe, tokenizer) if settings.mixed.documents else []
    questions = {
        name: read_questions(task, rng_seed=recipe.rng_seed, root=recipe.data.root)
        for name, task in settings.tasks.items()
    }
    harness = Harness(requests_of(recipe), allow_code_execution=settings.harness.allow_code_execution)
    shown = to_show(run_folder, recipe, tokenizer, questions)
    length = recipe.data.sequence_length
    return _Measures(documents, mixed, tokenizer, length, False, questions, harness, shown)


def _record(
    name: str, entry: ModelEntry | OtherEntry, recipe: Recipe, measures: _Measures, file: Path, log: Log
) -> dict[str, Any]:
    """What is kept of a model in `file`: what is missing there, or was made of something else, is measured."""
    before: dict[str, Any] | None = read_json(file, Kept)
    key = measures.key(entry, recipe)
    shown_key = measures.shown.key(key)
    record = before if before is not None and before["key"] == key else None
    if record is not None:
        log(f"{name}: measured before, kept")
        if record.get("shown", {}).get("key") == shown_key:
            return record
    answers = bool(measures.questions) or bool(measures.harness)
    model = load_model_or_btm(entry.path, measuring_place(recipe, log, answers=answers))
    tokenizer = load_tokenizer(entry.path)
    if isinstance(entry, OtherEntry):
        measures = measures.as_read_by(model, tokenizer)
    measured = record or {"key": key, **_measure(model, tokenizer, recipe, measures)}
    shown = measures.shown.of(name, model, tokenizer, measured["measured"])
    write_sealed(file, measured | {"shown": {"key": shown_key, **shown}})
    if record is None:
        log(_summary(name, measured["measured"]))
    return measured | {"shown": shown}


def _measure(
    model: PreTrainedModel | SideBySide, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, measures: _Measures
) -> dict[str, Any]:
    """`measured`: everything results.json says of a model except what it cost to train; `documents`: its part of
    documents.json."""
    cost = cost_of(model)
    domains = {name: bits_per_byte(model, packed) for name, packed in measures.packed.items()}
    mixed = bits_per_byte(model, measures.mixed) if measures.mixed is not None else None
    tasks = {
        name: exact_match(model, tokenizer, questions, recipe.evaluate.tasks[name])
        for name, questions in measures.questions.items()
    }
    scores = measures.harness.measure(model, tokenizer)
    measured = {
        "domains": {name: result.as_json() for name, result in domains.items()},
        **({"mixed": mixed.as_json()} if mixed else {}),
        "tasks": {name: result.as_json() for name, result in (tasks | scores).items()},
        "mean_bits_per_byte": sum(result.bits_per_byte for result in domains.values()) / len(domains),
        "active_params": cost.active_params,
        "total_params": cost.total_params,
        "inference_flops_per_token": cost.inference_flops_per_token(recipe.data.sequence_length),
        "eval_tokens_per_s": round(
            sum(result.tokens for result in domains.values()) / sum(result.seconds for result in domains.values()), 1
        ),
    }
    documents = {
        "domains": {name: result.document_bits for name, result in domains.items()},
        **({"mixed": mixed.document_bits} if mixed else {}),
        "tasks": {name: [int(answer.correct) for answer in result.answers] for name, result in tasks.items()}
        | {name: score.correct for name, score in scores.items() if score.correct is not None},
    }
    return {"measured": measured, "documents": documents}


def _summary(name: str, measured: Mapping[str, Any]) -> str:
    """One line for the user."""
    parts = [f"{domain} {result['bits_per_byte']:.3f}" for domain, result in measured["domains"].items()]
    parts += [f"mixed {measured['mixed']['bits_per_byte']:.3f}"] if "mixed" in measured else []
    parts += [f"{task} {score_text(result)}" for task, result in measured["tasks"].items()]
    return f"{name}: mean {measured['mean_bits_per_byte']:.3f} bits per byte; {', '.join(parts)}"
