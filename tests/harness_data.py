"""Tiny files in the formats of the nine tasks, made on the spot."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

SUBJECTS = ("abstract_algebra", "virology")


def lines() -> dict[str, list[dict[str, Any]]]:
    """Task → lines of its file."""
    add = "def add{i}(a, b):\n    return a + b + {i}"
    return {
        "gsm8k": [{"question": f"What is {i} and 1,000?", "answer": f"It is {i} + 1,000.\n#### {1000 + i:,}"}
                  for i in range(12)],
        "arc_easy": [{"query": f"Question: Which of four, case {i}?", "choices": ["one", "a pair", "three", "4"],
                      "gold": i % 4} for i in range(4)],
        "arc_challenge": [{"query": f"Question: Which of three, case {i}?", "choices": ["x", "yy", "z z"],
                           "gold": i % 3} for i in range(4)],
        "piqa": [{"goal": f"open jar {i}", "sol1": "turn the lid", "sol2": "turn the jar over", "label": i % 2}
                 for i in range(4)],
        "winogrande": [{"context_options": [f"Ann met Eve {i} times, so Ann", f"Ann met Eve {i} times, so Eve"],
                        "continuation": "was glad.", "gold": i % 2} for i in range(4)],
        "triviaqa": [{"context": f"Question: Who was king {i}?\nAnswer:", "answer": f"Henry {i}",
                      "aliases": [f"King Henry {i}", f"Henry {i}", f"Henry, the {i}."]} for i in range(9)],
        "mmlu": [{"subject": subject, "question": f" What of {subject} {i}? ", "A": "1", "B": "2", "C": "3", "D": "4",
                  "answer": "ABCD"[i % 4]} for subject in SUBJECTS for i in range(8)],
        "humaneval": [{"task_id": f"HumanEval/{i}", "prompt": f'def add{i}(a, b):\n    """Their sum and {i}."""\n',
                       "entry_point": f"add{i}", "canonical_solution": f"    return a + b + {i}\n",
                       "test": f"def check(candidate):\n    assert candidate(1, 2) == {3 + i}\n"} for i in range(3)],
        "mbpp": [{"text": f"Add two numbers and {i}.", "code": add.format(i=i).replace("\n", "\r\n"), "task_id": i,
                  "test_setup_code": "one = 1",
                  "test_list": [f"assert add{i}(one, {n}) == {1 + n + i}" for n in range(3)],
                  "challenge_test_list": []} for i in (*range(1, 14), 511)],
    }  # fmt: skip


PAPER_SHOTS = {"gsm8k": 8, "humaneval": 0, "mbpp": 3, "triviaqa": 5, "arc_easy": 0, "arc_challenge": 0, "piqa": 0,
               "winogrande": 0, "mmlu": 5}  # fmt: skip
SCORED = {"gsm8k": 4, "humaneval": 3, "mbpp": 3, "triviaqa": 4, "arc_easy": 4, "arc_challenge": 4, "piqa": 4,
          "winogrande": 4, "mmlu": 6}  # fmt: skip


def write_task_files(folder: Path) -> dict[str, Path]:
    """Task → its file; every other one compressed."""
    paths = {}
    for number, (name, documents) in enumerate(lines().items()):
        text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents).encode()
        path = paths[name] = folder / f"{name}.jsonl{'.gz' if number % 2 else ''}"
        path.write_bytes(gzip.compress(text) if number % 2 else text)
    return paths


def gold_answer(document: dict[str, Any]) -> str:
    """What a perfect model would write."""
    if "canonical_solution" in document or "entry_point" in document:
        number = int(document["task_id"].partition("/")[2])
        return f"    return a + b + {number}\n"
    return str(document.get("code") or " " + (document.get("aliases") or [document.get("answer")])[-1])


def gold_index(document: dict[str, Any]) -> int:
    """Which choice is right."""
    if "answer" in document:
        return "ABCD".index(document["answer"])
    return int(document.get("gold", document.get("label")))
