"""Tasks of lm-evaluation-harness from local files: which there are, what a file has to hold, what is asked and shown.

A task is one YAML file in `harness_tasks/`: lm-eval's own keys, without its data set, and under `btx:`

    fields         key of a line → kind of value (`KINDS`)
    shots          solved examples in front of a question, if nothing else is said: the paper's number
    shots_by       key: shots are those of the question's own value of it
    shots_where    {key: values}: the lines that shots are taken from, in this order
    scored_where   {key: [first, last]}: the lines that are scored
    program        template of the program that decides whether an answer is right; such a task runs code

Without `shots_where` the shots are the first lines of the file (of each value of `shots_by`), which are then not
scored. Plain Python; lm-eval itself is used in `btx.evaluation.harness`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from btx.data.document_files import located
from btx.data.json_lines import refuse_half_characters
from btx.errors import DataError
from btx.evaluation.published_layouts import task_lines
from btx.files import value_hash
from btx.number_texts import spread

if TYPE_CHECKING:
    from btx.recipe.schema import Recipe

FOLDER = Path(__file__).parent / "harness_tasks"

Document = dict[str, Any]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item for item in value)


def _is_index(value: Any, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


KINDS: dict[str, Callable[[Any, str, Document], bool]] = {
    "text": lambda value, _, line: isinstance(value, str) and bool(value.strip()),
    "any text": lambda value, _, line: isinstance(value, str),
    "texts": lambda value, _, line: _is_texts(value),
    "whole number": lambda value, _, line: isinstance(value, int) and not isinstance(value, bool),
    "index of": lambda value, of, line: _is_index(value, len(line[of])),
    "index below": lambda value, size, line: _is_index(value, int(size)),
    "one of": lambda value, words, line: value in words.split(),
}
"""Kinds of values, some followed by what they refer to: another key, a number, words."""


@dataclass(frozen=True)
class LocalTask:
    """A task that btx reads from a file."""

    name: str
    config: dict[str, Any]
    """lm-eval's keys."""
    fields: dict[str, str] = field(default_factory=dict)
    shots: int | None = None
    shots_by: str | None = None
    shots_where: dict[str, list[Any]] | None = None
    scored_where: dict[str, list[int]] | None = None
    program: str | None = None


@cache
def local_tasks() -> dict[str, LocalTask]:
    """Every task of `harness_tasks/` by its name."""
    return {path.stem: _read_task(path) for path in sorted(FOLDER.glob("*.yaml"))}


def _read_task(path: Path) -> LocalTask:
    config = yaml.safe_load(path.read_text("utf-8"))
    return LocalTask(name=path.stem, **config.pop("btx"), config=config)


@dataclass(frozen=True)
class TaskRequest:
    """A task to measure models on, as the recipe or the command line asks for it."""

    label: str
    """Its name in the results."""
    name: str
    """Its name in `local_tasks()`, or in the installed lm-eval."""
    file: Path | None = None
    shots_file: Path | None = None
    shots: int | None = None
    limit: int | None = None

    @property
    def task(self) -> LocalTask | None:
        """The task's description if btx has one and a file is given."""
        return local_tasks().get(self.name) if self.file is not None else None

    @property
    def paper_shots(self) -> int | None:
        """The paper's number of shots, where it uses the task."""
        known = local_tasks().get(self.name)
        return None if known is None else known.shots


@dataclass(frozen=True)
class TaskDocuments:
    """What a file gives: disjoint lists of documents."""

    scored: list[Document]
    shots: list[Document]
    """In the order in which they are shown; those of all values of `shots_by` one after the other."""

    @property
    def fingerprint(self) -> str:
        """Hash of every document."""
        return value_hash({"scored": self.scored, "shots": self.shots})


def requests_of(recipe: Recipe) -> list[TaskRequest]:
    """What a recipe's `evaluate.harness` asks for; files relative to `data.root`."""
    root = recipe.data.root
    return [
        TaskRequest(
            label, task.name or label, file=None if task.file is None else located(task.file, root),
            shots_file=None if task.shots_file is None else located(task.shots_file, root), shots=task.shots,
            limit=task.limit,
        )
        for label, task in recipe.evaluate.harness.tasks.items()
    ]  # fmt: skip


def read_documents(request: TaskRequest, shots: int) -> TaskDocuments:
    """The documents of a task's file that are scored and those that are shown.

    Args:
        shots: solved examples in front of each question.

    Raises:
        DataError: no such file, a broken line or field (named with file and line number), too few documents.
    """
    if request.file is None:
        raise ValueError(f"{request.label}: no file")
    task = request.task or LocalTask(request.name, {})
    lines = _read_lines(request.file, task)
    pool = lines if request.shots_file is None else _read_lines(request.shots_file, task)
    own_file = request.shots_file is None
    shown = _shown(task, pool, shots, str(request.shots_file or request.file), own_file=own_file)
    taken = {value_hash(document) for document in shown}
    scored = [document for document in _scored(task, lines, own_file) if value_hash(document) not in taken]
    if not scored:
        needed = f"; only lines with {task.scored_where} are scored" if task.scored_where and own_file else ""
        raise DataError(f"{request.file}: no document is left to score: it has {len(lines)}, of which {len(shown)} are "
                        f"shots{needed}. Give a longer file, fewer `shots` or a `shots_file`")  # fmt: skip
    if task.shots_by and shots:
        missing = {document[task.shots_by] for document in scored} - {document[task.shots_by] for document in shown}
        if missing:
            raise DataError(f"{request.shots_file or request.file}: no shots for {task.shots_by} "
                            f"{', '.join(sorted(missing)[:5])}, which {request.file} asks questions of")  # fmt: skip
    if request.limit is not None:  # evenly: files are often sorted by subject
        scored = spread(scored, request.limit)
    return TaskDocuments(scored, shown)


def _read_lines(path: Path, task: LocalTask) -> list[Document]:
    lines = [_document(line, task, where) for where, line in task_lines(path, task.name)]
    if not lines:
        raise DataError(f"{path}: no documents; a task file has one JSON object a line")
    return lines


def _document(document: Document, task: LocalTask, where: str) -> Document:
    for key, kind in task.fields.items():
        if key not in document or not _is_of_kind(document[key], kind, document):
            raise DataError(
                f"{where}: {key!r} should be there and be {kind!r}; {task.name} from a file has on every line "
                f"{', '.join(f'{name} ({what})' for name, what in task.fields.items())}, or what it was published with "
                f"(docs/evaluation-tasks.md); this line has: {', '.join(document) or 'nothing'}"
            )
    # Only what the task uses: other keys may differ from line to line.
    used = {key: document[key] for key in task.fields} if task.fields else document
    for key, value in used.items():
        refuse_half_characters(value, where, key)
    return used


def _is_of_kind(value: Any, kind: str, document: Mapping[str, Any]) -> bool:
    words = next(words for words in KINDS if kind == words or kind.startswith(f"{words} "))
    return KINDS[words](value, kind.removeprefix(words).strip(), dict(document))


def _shown(task: LocalTask, pool: list[Document], shots: int, where: str, *, own_file: bool) -> list[Document]:
    if shots == 0:
        return []
    if task.shots_where and own_file:
        ((key, values),) = task.shots_where.items()
        by_value = {document[key]: document for document in reversed(pool)}
        pool = [by_value[value] for value in values if value in by_value]
    groups: dict[Any, list[Document]] = {}
    for document in pool:
        groups.setdefault(document[task.shots_by] if task.shots_by else None, []).append(document)
    if not groups:
        raise DataError(f"{where}: there are no documents to take shots from; ask for none with `shots: 0`")
    for value, documents in groups.items():
        if len(documents) < shots:
            whose = f" with {task.shots_by} {value!r}" if task.shots_by else ""
            source = f" (lines with {task.shots_where})" if task.shots_where and own_file else ""
            raise DataError(f"{where}: {shots} shots are asked for, but there are only {len(documents)} documents"
                            f"{whose} to take them from{source}; ask for fewer with `shots`")  # fmt: skip
    return [document for documents in groups.values() for document in documents[:shots]]


def _scored(task: LocalTask, lines: list[Document], own_file: bool) -> list[Document]:
    if not task.scored_where or not own_file:
        return lines
    ((key, (first, last)),) = task.scored_where.items()
    return [document for document in lines if first <= document[key] <= last]
