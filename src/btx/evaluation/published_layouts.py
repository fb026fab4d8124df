"""The files that tasks were published in, and their copies on the hub as JSONL → the fields that btx reads.

arc_*         question {stem, choices [{text, label}]} or question and choices {text, label}; answerKey
piqa          goal, sol1, sol2, and the labels in a file beside it: valid.jsonl and valid-labels.lst
social_iqa    the same, labels from 1 on
winogrande    sentence with "_", option1, option2, answer 1 or 2
triviaqa      question, answer {value, aliases}; in the first publication Question, Answer {Value, Aliases}
mmlu          subject, question, choices, answer 0 to 3; or <subject>_test.csv: question, A, B, C, D, answer
mbpp          the sanitized half: prompt and test_imports in place of text and test_setup_code
boolq         answer true or false in place of label
openbookqa    question {stem, choices [{text, label}]}
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from btx.data.json_lines import json_objects
from btx.errors import DataError

Document = dict[str, Any]
FIRST_LABEL = {"piqa": 0, "social_iqa": 1}
"""Tasks whose labels are in a file of their own → the first label."""


def task_lines(path: Path, task: str) -> Iterator[tuple[str, Document]]:
    """(place, document) of every line of a task's file; published fields are made those that the task has here.

    Raises:
        DataError: a file that cannot be read, or labels that are not there, or too few.
    """
    labels = _labels(path, task)
    for number, (where, line) in enumerate(_lines(path, task)):
        if labels is not None:
            if number >= len(labels):
                raise DataError(f"{where}: {_labels_file(path)} has only {len(labels)} labels")
            line = {**line, "label": labels[number]}
        try:
            yield where, PUBLISHED[task](line) if task in PUBLISHED else line
        except (KeyError, ValueError, TypeError, AttributeError, IndexError):
            yield where, line  # not that layout: what is wrong is said of the fields that are there


def _lines(path: Path, task: str) -> Iterator[tuple[str, Document]]:
    if path.suffix != ".csv" or task != "mmlu":
        yield from json_objects(path, "document")
        return
    subject = path.stem.removesuffix("_test").removesuffix("_val").removesuffix("_dev")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if len(row) != 6:
                    raise DataError(f"{path}:{number}: {len(row)} columns; MMLU's files have six, the answer last")
                fields = dict(zip(("question", *"ABCD", "answer"), row, strict=True))
                yield f"{path}:{number}", fields | {"subject": subject}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _labels_file(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.gz').removesuffix('.jsonl')}-labels.lst")


def _labels(path: Path, task: str) -> list[Any] | None:
    """The labels of a file that has none on its lines; None where they are on the lines, or the task has none."""
    if task not in FIRST_LABEL or "label" in next(json_objects(path, "document"), ("", {"label": 0}))[1]:
        return None
    file = _labels_file(path)
    try:
        words = file.read_text("utf-8").split()
    except OSError:
        raise DataError(f"{path}: its lines have no 'label', and the labels are not beside it in {file.name}; put the "
                        f"published file of labels there") from None  # fmt: skip
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8: {error}") from error
    first = FIRST_LABEL[task]
    known = {str(label) for label in range(first, first + 3 - (task == "piqa"))}
    if wrong := [word for word in words if word not in known]:
        raise DataError(f"{file}: label {wrong[0]!r}; there are: {', '.join(sorted(known))}")
    return [int(word) if task == "piqa" else word for word in words]


def _choices(line: Document) -> tuple[str, list[str], int]:
    """Question, choices and index of the right one, as ARC and OpenBookQA have them."""
    question: Any = line["question"]
    choices: Any = line.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = [choice["text"] for choice in choices], [choice["label"] for choice in choices]
    return question, texts, labels.index(line["answerKey"].strip())


def _arc(line: Document) -> Document:
    if "query" in line:
        return line
    question, texts, gold = _choices(line)
    return {"query": f"Question: {question}", "choices": texts, "gold": gold}


def _openbookqa(line: Document) -> Document:
    if "question_stem" in line:
        return line
    question, texts, gold = _choices(line)
    letters = "ABCDEFGH"[: len(texts)]
    return {"question_stem": question, "choices": {"text": texts, "label": list(letters)}, "answerKey": letters[gold]}


def _winogrande(line: Document) -> Document:
    if "sentence" not in line:
        return line
    before, blank, after = line["sentence"].partition("_")
    options = [f"{before}{line[option]}" for option in ("option1", "option2")]
    gold = ["1", "2"].index(str(line["answer"]))
    return {"context_options": options, "continuation": after.strip(), "gold": gold} if blank else line


def _triviaqa(line: Document) -> Document:
    question, answer = line.get("question", line.get("Question")), line.get("answer", line.get("Answer"))
    if question is None or not isinstance(answer, dict):
        return line
    value, aliases = answer.get("value", answer.get("Value")), answer.get("aliases", answer.get("Aliases"))
    return {"context": f"Question: {question}\nAnswer:", "answer": value, "aliases": aliases or [value]}


def _mmlu(line: Document) -> Document:
    if "choices" not in line:
        return line
    A, B, C, D = line["choices"]
    answer = line["answer"]
    letter = "ABCD"[answer] if isinstance(answer, int) and 0 <= answer < 4 else answer
    return {**line, "A": A, "B": B, "C": C, "D": D, "answer": letter}


def _mbpp(line: Document) -> Document:
    if "text" in line or "prompt" not in line:
        return line
    return {**line, "text": line["prompt"], "test_setup_code": "\n".join(line.get("test_imports") or [])}


def _boolq(line: Document) -> Document:
    return line if "label" in line else {**line, "label": [False, True].index(line["answer"])}


PUBLISHED: dict[str, Callable[[Document], Document]] = {
    "arc_easy": _arc, "arc_challenge": _arc, "winogrande": _winogrande, "triviaqa": _triviaqa, "mmlu": _mmlu,
    "mbpp": _mbpp, "boolq": _boolq, "openbookqa": _openbookqa,
}  # fmt: skip
"""Task → makes the fields that are read of a published line; a line of the listed layout stays as it is."""
