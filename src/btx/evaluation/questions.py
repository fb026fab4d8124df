"""The questions of a recipe's own tasks: generated, or read from a file. Plain Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from btx.data import domains
from btx.data.document_files import located
from btx.data.domains import Question
from btx.data.json_lines import json_objects, refuse_half_characters
from btx.errors import DataError

if TYPE_CHECKING:
    from btx.recipe.evaluate import Task


def read_questions(task: Task, *, rng_seed: int, root: str | None) -> list[Question]:
    """The questions of a task.

    Args:
        task: generator or file; at most `task.questions` are taken.
        rng_seed: the recipe's, for generated questions.
        root: folder a relative `task.path` starts from; None is the working directory.

    Raises:
        DataError: no such file, a broken line (named with file and number), no question at all.
    """
    if task.path is None:
        return domains.questions(cast(str, task.generate), rng_seed, task.questions)
    path = located(task.path, root)
    questions: list[Question] = []
    for where, item in json_objects(path, "question"):
        if len(questions) == task.questions:
            break
        questions.append(_question(item, task, where))
    if not questions:
        raise DataError(f"{path}: no questions; a task file has one JSON object a line")
    return questions


def _question(item: dict[str, Any], task: Task, where: str) -> Question:
    for key in (task.prompt, task.answer):
        if not isinstance(item.get(key), str | int | float) or not str(item[key]).strip():
            raise DataError(
                f"{where}: {key!r} should hold the text of a question or an answer; the line's keys are: "
                f"{', '.join(item) or 'none'}; choose others with the task's `prompt` and `answer`"
            )
        refuse_half_characters(item[key], where, key)
    prompt, answer = str(item[task.prompt]), str(item[task.answer])
    return Question(prompt, answer, prompt + answer)
