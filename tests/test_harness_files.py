"""Files of lm-evaluation-harness tasks: what is scored, what is shown, and what is refused. Without lm-eval."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from btx.errors import DataError, RecipeError, UserError
from btx.evaluation import harness_checks
from btx.evaluation.harness_checks import check_harness
from btx.evaluation.harness_files import KINDS, TaskRequest, local_tasks, read_documents, requests_of
from btx.recipe.evaluate import CODE_TASKS
from btx.recipe.loading import parse_recipe
from btx.running.preflight import preflight
from tests.harness_data import PAPER_SHOTS, SCORED, lines, write_task_files
from tests.pico_models import RECIPE


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_task_files(tmp_path_factory.mktemp("tasks"))


def test_the_nine_tasks_have_the_paper_s_shots_and_known_kinds_and_those_that_run_code_are_known() -> None:
    assert {name: task.shots for name, task in local_tasks().items()} == PAPER_SHOTS
    assert {name for name, task in local_tasks().items() if task.program} == set(CODE_TASKS)
    for task in local_tasks().values():
        assert all(any(kind == known or kind.startswith(f"{known} ") for known in KINDS)
                   for kind in task.fields.values())  # fmt: skip


@pytest.mark.parametrize("name", PAPER_SHOTS)
def test_no_document_is_both_shown_and_scored(name: str, files: dict[str, Path]) -> None:
    found = read_documents(TaskRequest(name, name, files[name]), PAPER_SHOTS[name])
    assert len(found.scored) == SCORED[name]
    assert not [document for document in found.shots if document in found.scored]
    known = [{key: line[key] for key in local_tasks()[name].fields} for line in lines()[name]]
    assert all(document in known for document in [*found.shots, *found.scored])


def test_shots_come_from_the_start_of_the_file_of_each_subject_or_from_mbpp_s_prompt_problems(files) -> None:
    gsm8k = read_documents(TaskRequest("gsm8k", "gsm8k", files["gsm8k"]), 2)
    assert [document["question"][:9] for document in [*gsm8k.shots, gsm8k.scored[0]]] == ["What is 0", "What is 1",
                                                                                        "What is 2"]  # fmt: skip
    mmlu = read_documents(TaskRequest("mmlu", "mmlu", files["mmlu"]), 5)
    assert [(d["subject"][:3], d["question"][-4:-2]) for d in mmlu.shots[4:7]] == [("abs", " 4"), ("vir", " 0"),
                                                                                  ("vir", " 1")]  # fmt: skip
    mbpp = read_documents(TaskRequest("mbpp", "mbpp", files["mbpp"]), 3)
    assert [document["task_id"] for document in mbpp.shots] == [2, 3, 4]
    assert [document["task_id"] for document in mbpp.scored] == [11, 12, 13]


def test_shots_may_come_from_another_file_and_none_of_them_is_scored(files, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(line) + "\n" for line in lines()["gsm8k"][3:6]))
    found = read_documents(TaskRequest("gsm8k", "gsm8k", files["gsm8k"], shots_file=other), 2)
    assert len(found.scored) == 10
    assert not [document for document in found.shots if document in found.scored]


def test_a_limit_is_spread_evenly_over_the_file(files) -> None:
    found = read_documents(TaskRequest("mmlu", "mmlu", files["mmlu"], limit=2), 5)
    assert [document["subject"] for document in found.scored] == ["abstract_algebra", "virology"]
    assert len(read_documents(TaskRequest("mmlu", "mmlu", files["mmlu"], limit=99), 5).scored) == 6


@pytest.mark.parametrize(("name", "text", "message"), [
    ("arc_easy", '{"query": "a", "choices": ["x"], "gold": 0}\n{"query": "a"', ":2: not JSON"),
    ("arc_easy", "[]", "a document is a JSON object, not list"),
    ("arc_easy", '{"question": "a"}', "'query' should be there and be 'text'.*this line has: question"),
    ("arc_easy", '{"query": "a", "choices": ["x", "y"], "gold": 2}', "'gold' should .* 'index of choices'"),
    ("piqa", '{"goal": "a", "sol1": "b", "sol2": "c", "label": true}', "'label' should be there"),
    ("mmlu", '{"subject": "s", "question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "E"}', "'answer'"),
    ("gsm8k", "\n", "no documents"),
    ("gsm8k", '{"question": "q", "answer": "a"}', "8 shots are asked for, but there are only 1"),
    ("mbpp", '{"task_id": 1, "text": "t", "code": "c", "test_list": ["a"], "test_setup_code": ""}', "only 1 documents"),
])  # fmt: skip
def test_a_broken_file_is_named_with_its_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as refused:
        read_documents(TaskRequest(name, name, path), PAPER_SHOTS[name])
    assert str(path) in str(refused.value)


def test_subjects_without_shots_and_files_without_documents_to_score_are_refused(tmp_path: Path) -> None:
    mmlu, mbpp = lines()["mmlu"], lines()["mbpp"]
    asked, shown, prompts = (tmp_path / name for name in ("asked", "shown", "prompts"))
    asked.write_text("".join(json.dumps(line) + "\n" for line in mmlu))
    shown.write_text("".join(json.dumps(line) + "\n" for line in mmlu[:8]))
    prompts.write_text("".join(json.dumps(line) + "\n" for line in mbpp[:10]))
    with pytest.raises(DataError, match="no shots for subject virology"):
        read_documents(TaskRequest("mmlu", "mmlu", asked, shots_file=shown), 5)
    with pytest.raises(DataError, match=r"no document is left to score.*\[11, 510\]"):
        read_documents(TaskRequest("mbpp", "mbpp", prompts), 3)
    with pytest.raises(DataError, match="cannot be read"):
        read_documents(TaskRequest("mbpp", "mbpp", tmp_path / "none"), 3)


# --- the recipe and what is refused before training -----------------------------------------------------------------


def recipe_text(harness: str) -> str:
    return RECIPE.replace("evaluate:\n", f"evaluate:\n  harness: {harness}\n")


def test_short_forms_of_the_recipe() -> None:
    listed = parse_recipe(recipe_text("{tasks: [hellaswag, arc_easy]}"), "a.yaml")
    assert requests_of(listed) == [TaskRequest("hellaswag", "hellaswag"), TaskRequest("arc_easy", "arc_easy")]
    assert [request.task for request in requests_of(listed)] == [None, None]
    text = "{tasks: {gsm8k: g.jsonl, few: {name: gsm8k, file: g.jsonl, shots: 1, limit: 5}}}"
    full, few = requests_of(parse_recipe(recipe_text(text).replace("data:\n", "data:\n  root: /there\n"), "a.yaml"))
    assert full == TaskRequest("gsm8k", "gsm8k", Path("/there/g.jsonl"))
    assert few == replace(full, label="few", shots=1, limit=5)
    assert few.task is local_tasks()["gsm8k"]


@pytest.mark.parametrize(("harness", "message"), [
    ("{tasks: {humaneval: h.jsonl}}", "evaluate.harness.allow_code_execution: true"),
    ("{tasks: {code: {name: mbpp, file: m.jsonl}}}", "evaluate.harness.tasks.code: mbpp runs programs"),
    ("{tasks: [humaneval], allow_code_execution: true}", "humaneval needs a file"),
    ("{tasks: {gsm8k: {shots_file: s.jsonl}}}", "shots_file goes with file"),
    ("{tasks: {knowledge: {name: gsm8k}}}", "both have 'knowledge'"),
    ("{tasks: [1]}", "harness.tasks"),
])  # fmt: skip
def test_a_recipe_that_cannot_be_measured_is_refused_when_it_is_read(harness: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe_text(harness), "a.yaml")


def test_without_lm_eval_the_command_that_installs_it_is_named_before_training(files, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(harness_checks, "find_spec", lambda name: None if name == "lm_eval" else object())
    text = recipe_text(f"{{tasks: {{gsm8k: {files['gsm8k']}}}}}")
    for name in ("math", "general"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    recipe = parse_recipe(text.replace("data:\n", f"data:\n  root: {tmp_path}\n"), "a.yaml")
    with pytest.raises(UserError, match=r'\(lm_eval\): pip install "branchtrainmix\[eval\]"'):
        preflight(recipe)


def test_code_is_not_run_without_permission(files, monkeypatch) -> None:
    monkeypatch.setattr(harness_checks, "find_spec", lambda name: object())
    request = TaskRequest("humaneval", "humaneval", files["humaneval"])
    with pytest.raises(UserError, match="--allow-code-execution"):
        check_harness([request], allow_code_execution=False)
    assert check_harness([], allow_code_execution=False) == {}


# The files that tasks were published in

ARC = [{"text": "one", "label": "A"}, {"text": "two", "label": "B"}]
PUBLISHED: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "AI2's ARC": ("arc_easy", [{"id": "M1", "question": {"stem": "Which?", "choices": ARC}, "answerKey": "B"}],
                  {"query": "Question: Which?", "choices": ["one", "two"], "gold": 1}),
    "ARC on the hub": ("arc_challenge", [{"id": "M1", "question": "Which?", "answerKey": "2",
                                          "choices": {"text": ["one", "two"], "label": ["1", "2"]}}],
                       {"query": "Question: Which?", "choices": ["one", "two"], "gold": 1}),
    "Winogrande": ("winogrande", [{"qID": "a-1", "sentence": "Ann met Eve so _ was glad.", "option1": "Ann",
                                   "option2": "Eve", "answer": "2"}],
                   {"context_options": ["Ann met Eve so Ann", "Ann met Eve so Eve"], "continuation": "was glad.",
                    "gold": 1}),
    "TriviaQA on the hub": ("triviaqa", [{"question": "Who?", "answer": {"value": "I", "aliases": ["I", "me"]}}],
                            {"context": "Question: Who?\nAnswer:", "answer": "I", "aliases": ["I", "me"]}),
    "TriviaQA": ("triviaqa", [{"Question": "Who?", "Answer": {"Value": "I", "Aliases": []}}],
                 {"context": "Question: Who?\nAnswer:", "answer": "I", "aliases": ["I"]}),
    "MMLU on the hub": ("mmlu", [{"subject": "law", "question": "Q", "choices": ["w", "x", "y", "z"], "answer": 2}],
                        {"subject": "law", "question": "Q", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "C"}),
    "sanitized MBPP": ("mbpp", [{"task_id": 11, "prompt": "Add.", "code": "x", "test_imports": ["import math"],
                                 "test_list": ["assert 1"]}],
                       {"task_id": 11, "text": "Add.", "code": "x", "test_list": ["assert 1"],
                        "test_setup_code": "import math"}),
}  # fmt: skip


@pytest.mark.parametrize("layout", PUBLISHED)
def test_a_published_file_gives_the_documents_that_are_listed(tmp_path: Path, layout: str) -> None:
    task, published, listed = PUBLISHED[layout]
    file = tmp_path / "published.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in published), "utf-8")
    assert read_documents(TaskRequest(task, task, file), 0).scored == [listed]
    file.write_text(json.dumps(listed) + "\n", "utf-8")
    assert read_documents(TaskRequest(task, task, file), 0).scored == [listed]


def test_mmlus_tables_have_their_subject_in_their_name(tmp_path: Path) -> None:
    file = tmp_path / "high_school_law_test.csv"
    file.write_text('"What, then?",w,x,y,z,D\n', "utf-8")
    assert read_documents(TaskRequest("mmlu", "mmlu", file), 0).scored == [
        {"subject": "high_school_law", "question": "What, then?", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "D"}
    ]
    file.write_text("What,then\n", "utf-8")
    with pytest.raises(DataError, match=r"law_test\.csv:1: 2 columns; MMLU's files have six"):
        read_documents(TaskRequest("mmlu", "mmlu", file), 0)


def test_piqas_labels_lie_beside_its_lines(tmp_path: Path) -> None:
    file, labels = tmp_path / "valid.jsonl", tmp_path / "valid-labels.lst"
    lines = [{"id": str(i), "goal": "open", "sol1": "turn", "sol2": f"pull {i}"} for i in range(2)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    request = TaskRequest("piqa", "piqa", file)
    with pytest.raises(DataError, match=r"no 'label', and the labels are not beside it in valid-labels\.lst"):
        read_documents(request, 0)
    labels.write_text("1\n0\n", "utf-8")
    assert [document["label"] for document in read_documents(request, 0).scored] == [1, 0]
    labels.write_text("1\n", "utf-8")
    with pytest.raises(DataError, match=r"valid\.jsonl:2: .*valid-labels\.lst has only 1 labels"):
        read_documents(request, 0)
    labels.write_text("1\n2\n", "utf-8")
    with pytest.raises(DataError, match="label '2'; there are: 0, 1"):
        read_documents(request, 0)


@pytest.mark.parametrize("line", [
    {"question": "Which?"}, {"question": {"stem": "Which?"}, "answerKey": "A"},
    {"question": {"stem": "Which?", "choices": ARC}, "answerKey": "E"}, {"question": 3, "choices": [], "answerKey": 1},
])  # fmt: skip
def test_another_layout_is_refused_with_the_keys_found_and_wanted(tmp_path: Path, line: dict[str, Any]) -> None:
    file = tmp_path / "arc.jsonl"
    file.write_text(json.dumps(line) + "\n", "utf-8")
    with pytest.raises(DataError) as refused:
        read_documents(TaskRequest("arc_easy", "arc_easy", file), 0)
    assert "arc.jsonl:1: 'query' should be there" in str(refused.value)
    assert f"this line has: {', '.join(line)}" in str(refused.value)
    assert "query (text), choices (texts), gold (index of choices)" in str(refused.value)
