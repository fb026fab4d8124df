"""Tasks of lm-evaluation-harness: models measured on local files without a network, or on anything lm-eval knows.

lm-eval builds the prompts, asks the model and scores the answers; here are its data (`btx.evaluation.harness_files`),
programs run behind a fence (`btx.evaluation.code_execution`) and one result a document, so that two models can be
compared on each document.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx.errors import UserError
from btx.evaluation.aggregate import mean_and_stderr
from btx.evaluation.code_execution import check_code_execution, fences_text, run_programs
from btx.evaluation.harness_checks import check_harness, installed_tasks, shots_of, task_manager
from btx.evaluation.harness_files import LocalTask, TaskDocuments, TaskRequest
from btx.files import value_hash
from btx.system_errors import blame

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from btx.models.outputs import SideBySide

MEASURE_VERSION = 1
"""Goes into the key of kept results; raised whenever a number would come out differently."""
SHOTS_RNG_SEED = 1234
"""lm-eval's own, for tasks from the hub whose shots are drawn."""
PASSED, SCORED, SHOTS = "pass@1", "scored", "shots"


@dataclass(frozen=True)
class TaskScore:
    """One model on one task."""

    metric: str
    """acc, exact_match, pass@1, ...: the task's first metric, with its first answer filter."""
    value: float
    stderr: float | None
    """Standard error of the mean over documents; None where the metric is no mean or there is one document."""
    shots: int
    limit: int | None
    n: int
    """Documents scored."""
    truncated: int
    """Prompts that did not fit into the model's context and lost their beginning."""
    correct: list[float] | None = None
    """The metric of every document in the order of the file, the same documents for every model: 1 right, 0 wrong. None
    where the metric is no mean over documents."""
    others: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Further metrics: name → {"value", "stderr"}."""

    def as_json(self) -> dict[str, Any]:
        """The entry of results.json."""
        return {
            self.metric: self.value, "metric": self.metric, "stderr": self.stderr, "shots": self.shots,
            "limit": self.limit, "n": self.n, "truncated": self.truncated, "others": self.others,
        }  # fmt: skip


class Harness:
    """Tasks of lm-evaluation-harness that models are measured on, read and checked once."""

    def __init__(self, requests: Sequence[TaskRequest], *, allow_code_execution: bool = False) -> None:
        """Read the files; lm-eval is imported when the first model is measured."""
        self.requests = list(requests)
        self.documents = check_harness(requests, allow_code_execution=allow_code_execution)
        self._tasks: dict[str, dict[str, Any]] = {}

    def __bool__(self) -> bool:
        return bool(self.requests)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides a model's scores, besides the model."""
        return value_hash([
            {"version": MEASURE_VERSION, "lm_eval": version("lm_eval")},
            *[{"request": {key: value for key, value in asdict(request).items() if "file" not in key},
               "task": request.task and asdict(request.task),
               "documents": documents and documents.fingerprint}
              for request in self.requests for documents in [self.documents[request.label]]],
        ])  # fmt: skip

    @property
    def note(self) -> str | None:
        """What the user should know before programs are run."""
        if any(request.task and request.task.program for request in self.requests):
            return fences_text(check_code_execution())
        return None

    def measure(self, model: PreTrainedModel | SideBySide, tokenizer: PreTrainedTokenizerBase) -> dict[str, TaskScore]:
        """Measure a model on every task; label → score.

        Args:
            model: causal language model, loaded by `btx.baselines.btm_model.load_model_or_btm`, on any device.

        Raises:
            UserError: lm-eval cannot load a task's data from the hub, or cannot score it.
        """
        if not self.requests:
            return {}
        from btx.evaluation.harness_model import HarnessModel

        with _quiet():
            adapter = HarnessModel(model, tokenizer)
        scores = {}
        for request in self.requests:
            if request.label not in self._tasks:
                with _quiet():
                    self._tasks[request.label] = _build(request, self.documents[request.label])
            scores[request.label] = _score(request, self._tasks[request.label], adapter)
        return scores


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no notes of lm-eval; errors are raised, not printed."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        yield


# --- building tasks -------------------------------------------------------------------------------------------------


def _build(request: TaskRequest, documents: TaskDocuments | None) -> dict[str, Any]:
    """lm-eval's task objects by name: one, or those of a group or tag."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    if documents is not None:
        shots = shots_of(request)
        if request.task is not None:
            config = _local_config(request.task, documents, shots)
        else:
            config = _installed_config(load_yaml(Path(installed_tasks()[request.name].yaml_path)), documents, shots)
        return {request.label: ConfigurableTask(config=config | {"task": request.label})}
    try:
        tasks: dict[str, Any] = task_manager().load([request.name])["tasks"]
    except Exception as error:  # datasets and the hub raise errors of many types
        blame(error)
        raise UserError(f"{request.label}: lm-eval cannot load {request.name!r} from the hub: {error}. Without a "
                        f"network give the task a `file`") from error  # fmt: skip
    wanted = request.paper_shots if request.shots is None else request.shots
    for task in tasks.values():
        if task.get_config("num_fewshot") is None or (wanted is not None and task.get_config("num_fewshot") != 0):
            task.set_config("num_fewshot", wanted or 0)
    return tasks


def _local_config(task: LocalTask, documents: TaskDocuments, shots: int) -> dict[str, Any]:
    """A task of `harness_tasks/` with its data."""
    config = deepcopy(task.config) | _data_keys(documents, shots)
    if shots:
        sampler: Any = "first_n"
        if task.shots_by is not None:  # lm-eval tells the sampler the question only where both come from one split
            sampler, config["fewshot_split"] = _sampler_of_groups(task.shots_by, documents, shots), SCORED
        config["fewshot_config"] = {**config.get("fewshot_config", {}), "sampler": sampler}
    if task.program is not None:
        config |= {
            "filter_list": [{"name": "none", "filter": [{"function": "custom", "filter_fn": _runs(task.program)}]}],
            "process_results": lambda document, results: {PASSED: results[0]},
            "metric_list": [{"metric": PASSED, "aggregation": "mean", "higher_is_better": True}],
        }
    return config


def _installed_config(config: dict[str, Any], documents: TaskDocuments, shots: int) -> dict[str, Any]:
    """A task of the installed lm-eval with other data."""
    for key in ("tag", "group", "task_list", "dataset_path", "dataset_name", "dataset_kwargs"):
        config.pop(key, None)
    own_shots = (config.get("fewshot_config") or {}).get("samples")
    config |= _data_keys(documents, shots)
    if documents.shots:
        kept = {key: value for key, value in (config.get("fewshot_config") or {}).items()
                if key not in ("samples", "split")}  # fmt: skip
        config["fewshot_config"] = kept | {"sampler": "first_n"}
    elif own_shots:
        config |= {"num_fewshot": len(own_shots) if isinstance(own_shots, list) else None, "fewshot_split": None}
    return config


def _data_keys(documents: TaskDocuments, shots: int) -> dict[str, Any]:
    """The keys that give a task its documents from memory: nothing is downloaded, nothing written to a cache."""
    from datasets import Dataset, DatasetDict

    splits = {SCORED: documents.scored} | ({SHOTS: documents.shots} if documents.shots else {})
    data = DatasetDict({name: Dataset.from_list(split) for name, split in splits.items()})
    return {
        "custom_dataset": lambda **_: data, "training_split": None, "validation_split": None, "test_split": SCORED,
        "fewshot_split": SHOTS if documents.shots else None, "num_fewshot": shots,
    }  # fmt: skip


def _sampler_of_groups(key: str, documents: TaskDocuments, shots: int) -> type:
    """An lm-eval sampler whose shots have the question's own value of `key`."""
    from lm_eval.api.samplers import ContextSampler

    groups: dict[Any, list[dict[str, Any]]] = {}
    for document in documents.shots:
        groups.setdefault(document[key], []).append(document)

    class OfTheSameGroup(ContextSampler):
        def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> list[dict[str, Any]]:
            return groups[eval_doc[key]][: min(n, shots)]

    return OfTheSameGroup


def _runs(program: str) -> Callable[[list[list[str]], list[dict[str, Any]]], list[float]]:
    """An lm-eval filter from answers to 1 for those whose program passes."""
    from jinja2 import Environment, StrictUndefined

    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(program)

    def run(answers: list[list[str]], documents: list[dict[str, Any]]) -> list[float]:
        programs = [
            template.render(document, completion=answer[0]) for answer, document in zip(answers, documents, strict=True)
        ]
        return [float(outcome.passed) for outcome in run_programs(programs)]

    return run


# --- scores ---------------------------------------------------------------------------------------------------------


def _score(request: TaskRequest, tasks: dict[str, Any], adapter: Any) -> TaskScore:
    from lm_eval.evaluator import evaluate

    for task in tasks.values():
        task.set_fewshot_seed(SHOTS_RNG_SEED)
    cut_before = adapter.truncated
    with _quiet():
        results: Any = evaluate(adapter, {"tasks": tasks}, limit=None if request.file else request.limit,
                                bootstrap_iters=0)  # fmt: skip
    metrics = _metrics(tasks, results["samples"])
    name = next(iter(metrics))
    correct = metrics[name]
    shots = int(next(iter(tasks.values())).get_config("num_fewshot") or 0)
    n = sum(len({sample["doc_id"] for sample in samples}) for samples in results["samples"].values())
    if correct is None:
        if len(tasks) > 1:
            raise UserError(f"{request.label}: the tasks of {request.name} have no metric in common that is a mean "
                            f"over documents; name them one by one: {', '.join(tasks)}")  # fmt: skip
        ((only, samples),) = results["samples"].items()
        value = float(results["results"][only][f"{name},{samples[0]['filter']}"])
        return TaskScore(name, value, None, shots, request.limit, n, adapter.truncated - cut_before)
    value, stderr = mean_and_stderr(correct)
    others = {other: dict(zip(("value", "stderr"), mean_and_stderr(values), strict=True))
              for other, values in metrics.items() if other != name and values is not None}  # fmt: skip
    return TaskScore(name, value, stderr, shots, request.limit, n, adapter.truncated - cut_before, correct, others)


def _metrics(tasks: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> dict[str, list[float] | None]:
    """Metric → its value on every document of all tasks, the tasks' first metric first; None: no mean over documents.

    A metric has its plain name with a task's first answer filter, and "NAME (FILTER)" with a later one.
    """
    values: dict[str, list[float] | None] = {}
    for task_name, task in tasks.items():
        first_filter = samples[task_name][0]["filter"]
        for sample in samples[task_name]:
            for metric in sample["metrics"]:
                name = metric if sample["filter"] == first_filter else f"{metric} ({sample['filter']})"
                is_mean = getattr(task.aggregation().get(metric), "__name__", "mean") in ("mean", "nanmean")
                so_far = values.setdefault(name, [])
                if not is_mean or not _is_scalar(sample[metric]):
                    values[name] = None
                elif so_far is not None:
                    so_far.append(float(sample[metric]))
    documents = sum(len({sample["doc_id"] for sample in of_one}) for of_one in samples.values())
    return {name: of_one if of_one is None or len(of_one) == documents else None for name, of_one in values.items()}


def _is_scalar(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False
