"""Tasks of lm-evaluation-harness on real pico models, offline: prompts, scores, and what stands in the results."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from btx.baselines.btm_model import load_model_or_btm
from btx.choices.routers import RoutingRule
from btx.cli import main as cli
from btx.errors import UserError
from btx.evaluation import harness, harness_checks
from btx.evaluation.aggregate import mean_and_stderr
from btx.evaluation.evaluate import ModelEntry, evaluate_models
from btx.evaluation.harness import Harness
from btx.evaluation.harness_files import TaskRequest
from btx.model_files.btx_folder import write_router
from btx.models.loading import load_model, load_tokenizer
from btx.recipe.loading import parse_recipe
from tests.harness_data import PAPER_SHOTS, SCORED, gold_answer, gold_index, lines, write_task_files
from tests.pico_models import RECIPE, llama, mixtral, prepared_run
from tests.test_btm import folder_of

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
METRICS = {"gsm8k": "exact_match", "triviaqa": "exact_match", "humaneval": "pass@1", "mbpp": "pass@1"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_task_files(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to another machine fails."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def all_tasks(files: dict[str, Path], **options: Any) -> Harness:
    requests = [TaskRequest(name, name, path, **options) for name, path in files.items()]
    return Harness(requests, allow_code_execution=True)


@pytest.mark.long
def test_a_real_model_answers_all_nine_tasks_without_a_network(files, dense, no_network) -> None:
    scores = all_tasks(files).measure(load_model(dense), load_tokenizer(dense))
    assert {name: score.n for name, score in scores.items()} == SCORED
    assert {name: score.shots for name, score in scores.items()} == PAPER_SHOTS
    for name, score in scores.items():
        assert score.metric == METRICS.get(name, "acc")
        assert score.correct is not None
        assert set(score.correct) <= {0.0, 1.0}
        assert len(score.correct) == score.n
        assert (score.value, score.stderr) == mean_and_stderr(score.correct)
        entry = score.as_json()
        assert entry[score.metric] == score.value
        assert entry.keys() >= {"stderr", "shots", "limit", "n", "truncated", "others"}
        json.dumps(entry, allow_nan=False)
    assert scores["gsm8k"].truncated == 4, "8 shots do not fit into 256 tokens"
    assert scores["arc_easy"].truncated == 0
    assert "acc_norm" in scores["arc_easy"].others
    assert "exact_match (flexible-extract)" in scores["gsm8k"].others


@pytest.mark.parametrize("right", [True, False])
def test_gold_answers_are_right_and_other_answers_wrong(right: bool, files, dense, monkeypatch) -> None:
    from btx.evaluation.harness_model import HarnessModel

    def write(self: Any, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return [gold_answer(request.doc) if right else " 12" for request in requests]

    def rate(self: Any, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return [(-1.0 if (request.idx == gold_index(request.doc)) == right else -99.0, False) for request in requests]

    monkeypatch.setattr(HarnessModel, "generate_until", write)
    monkeypatch.setattr(HarnessModel, "loglikelihood", rate)
    scores = all_tasks(files).measure(load_model(dense), load_tokenizer(dense))
    assert {name: score.value for name, score in scores.items()} == dict.fromkeys(scores, float(right))


def prompts(request: TaskRequest, dense: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What a model is asked: prompt and continuation or stop texts."""
    from btx.evaluation.harness_model import HarnessModel

    asked: list[tuple[str, Any]] = []

    def write(self: Any, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        asked.extend(request.args for request in requests)
        return [""] * len(requests)

    def rate(self: Any, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return [(0.0, False) for _ in write(self, requests)]

    monkeypatch.setattr(HarnessModel, "generate_until", write)
    monkeypatch.setattr(HarnessModel, "loglikelihood", rate)
    Harness([request], allow_code_execution=True).measure(load_model(dense), load_tokenizer(dense))
    return asked


def test_prompts_are_those_of_lm_eval_with_shots_of_the_own_subject(files, dense, monkeypatch) -> None:
    def asked(name: str, **options: Any) -> list[tuple[str, Any]]:
        return prompts(TaskRequest(name, name, files[name], **options), dense, monkeypatch)

    gsm8k = asked("gsm8k", shots=1)
    assert gsm8k[0][0] == ("Question: What is 0 and 1,000?\nAnswer: It is 0 + 1,000.\n#### 1,000\n\n"
                           "Question: What is 1 and 1,000?\nAnswer:")  # fmt: skip
    assert gsm8k[0][1]["until"][0] == "Question:"
    assert [gsm8k[i][0].count("What is 5") for i in (4, 5)] == [1, 0], "never the tested document itself"
    assert asked("arc_easy")[:2] == [("Question: Which of four, case 0?\nAnswer:", " one"),
                                     ("Question: Which of four, case 0?\nAnswer:", " a pair")]  # fmt: skip
    assert asked("piqa")[1] == ("Question: open jar 0\nAnswer:", " turn the jar over")
    assert asked("winogrande")[:2] == [(f"Ann met Eve 0 times, so {who}", " was glad.") for who in ("Ann", "Eve")]
    assert asked("triviaqa", shots=1)[0][0] == ("Question: Who was king 0?\nAnswer: Henry 0\n\n"
                                                "Question: Who was king 1?\nAnswer:")  # fmt: skip
    mmlu = asked("mmlu", shots=1)
    assert mmlu[0] == ("The following are multiple choice questions (with answers) about abstract algebra.\n\n"
                       "What of abstract_algebra 0?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\n"
                       "What of abstract_algebra 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", " A")  # fmt: skip
    assert "abstract" not in mmlu[-1][0]
    assert asked("humaneval")[0][0] == lines()["humaneval"][0]["prompt"]
    mbpp = asked("mbpp", shots=1)[0][0]
    assert mbpp.startswith("You are an expert Python programmer, and here is your task: Add two numbers and 2. Your")
    assert mbpp.endswith("assert add11(one, 2) == 14\n[BEGIN]\n")
    assert mbpp.count("[DONE]") == 1


@pytest.mark.parametrize("kind", ["switch", "btm"])
def test_models_that_only_btx_reads_are_scored_by_their_own_probabilities(kind: str, files, tmp_path: Path) -> None:
    if kind == "btm":
        folder = folder_of(tmp_path)
    else:
        plain = mixtral(tmp_path / "plain", top_k=1)
        folder = Path(shutil.copytree(plain, tmp_path / "switch"))
        assert write_router(folder, RoutingRule("switch"))
    model: Any = load_model_or_btm(folder)
    tokenizer = load_tokenizer(folder)
    found = all_tasks({"arc_easy": files["arc_easy"]}).measure(model, tokenizer)["arc_easy"]

    def log_likelihood(prompt: str, answer: str) -> float:
        ids = tokenizer(prompt + answer, return_tensors="pt").input_ids
        start = len(tokenizer(prompt).input_ids)
        with torch.no_grad():
            scores = model(input_ids=ids[:, :-1]).logits.log_softmax(dim=-1)[0]
        return float(scores.gather(1, ids[0, 1:, None])[start - 1 :].sum())

    expected = []
    for line in lines()["arc_easy"]:
        scores = [log_likelihood(f"{line['query']}\nAnswer:", f" {choice}") for choice in line["choices"]]
        expected.append(float(scores.index(max(scores)) == line["gold"]))
    assert found.correct == expected
    if kind == "btm":
        written = all_tasks({"triviaqa": files["triviaqa"]}, shots=0).measure(model, tokenizer)["triviaqa"]
        assert written.n == 9


def test_every_model_of_a_run_gets_its_scores_and_a_changed_file_is_measured_anew(tmp_path: Path) -> None:
    paths = write_task_files(tmp_path)
    text = RECIPE.replace("evaluate:\n", f"evaluate:\n  harness: {{tasks: {{arc_easy: {paths['arc_easy']}}}}}\n")
    run, settings = prepared_run(tmp_path / "run"), parse_recipe(text, "pico.yaml")
    models = {
        "seed": ModelEntry(llama(tmp_path / "seed"), tokens=0, flops=0.0, hours=0.0, inputs="one"),
        "btx": ModelEntry(mixtral(tmp_path / "btx"), tokens=9, flops=2e6, hours=1.0, inputs="two"),
    }
    lines_seen: list[str] = []
    results = evaluate_models(run, settings, models, log=lines_seen.append)
    for model in results["models"].values():
        assert model["tasks"].keys() == {"knowledge", "arc_easy"}
        assert {"acc", "stderr", "shots", "n"} <= model["tasks"]["arc_easy"].keys()
    assert "arc_easy" in lines_seen[0]
    right = json.loads((run / "evaluate" / "documents.json").read_text())["models"]["btx"]["tasks"]["arc_easy"]
    assert sum(right) / len(right) == results["models"]["btx"]["tasks"]["arc_easy"]["acc"]
    assert evaluate_models(run, settings, models, log=lines_seen.append) == results
    assert lines_seen[-1] == "btx: measured before, kept"
    shorter = gzip.decompress(paths["arc_easy"].read_bytes()).split(b"\n")[:3]
    paths["arc_easy"].write_bytes(gzip.compress(b"\n".join(shorter)))
    again = evaluate_models(run, settings, models, log=lines_seen.append)
    assert again["models"]["btx"]["tasks"]["arc_easy"]["n"] == 3


def test_the_command_measures_one_task_on_a_model_folder(files, dense, capsys) -> None:
    def call(*arguments: str) -> tuple[Any, str, str]:
        old, sys.argv = sys.argv, ["btx", "evaluate", str(dense), *arguments]
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            sys.argv = old
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    code, out, _ = call("--task", "piqa", "--file", str(files["piqa"]), "--limit", "2", "--json")
    entry = json.loads(out)["models"]["dense"]["tasks"]["piqa"]
    assert (code, entry["n"], entry["limit"], entry["metric"]) == (0, 2, 2, "acc")
    code, out, _ = call("--task", "piqa", "--file", str(files["piqa"]))
    assert code == 0
    assert out.startswith("dense: piqa acc ")
    assert call()[0] == 2
    assert "--task" in call()[2]
    assert call("--limit", "3")[0] == 2
    code, _, error = call("--task", "mbpp", "--file", str(files["mbpp"]))
    assert (code, "--allow-code-execution" in error) == (2, True)


# --- tasks that the installed lm-eval knows; its own 15000 take too long to list here ------------------------------

INSTALLED = {
    "quiz": {"task": "quiz", "dataset_path": "nobody/nothing", "output_type": "multiple_choice",
             "validation_split": "validation", "training_split": "train", "num_fewshot": 1,
             "doc_to_text": "{{ask}}?", "doc_to_target": 0, "doc_to_choice": ["yes", "no"]},
    "danger": {"task": "danger", "unsafe_code": True, "dataset_path": "nobody/nothing"},
    "both": {"group": "both", "task": ["quiz", "danger"]},
}  # fmt: skip


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    for name, config in INSTALLED.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(harness_checks, "task_manager", lambda: manager)
    monkeypatch.setattr(harness, "task_manager", lambda: manager)


def test_an_installed_task_takes_its_data_from_a_file(installed, dense, tmp_path: Path, no_network) -> None:
    data = tmp_path / "quiz.jsonl"
    data.write_text("".join(json.dumps({"ask": f"is {i} so"}) + "\n" for i in range(5)))
    score = Harness([TaskRequest("mine", "quiz", data)]).measure(load_model(dense), load_tokenizer(dense))["mine"]
    assert (score.metric, score.n, score.shots) == ("acc", 4, 1)


@pytest.mark.parametrize(("name", "file", "message"), [
    ("quizz", None, "no task 'quizz'; did you mean quiz"),
    ("danger", None, "without limits"),
    ("both", None, "in danger lm-eval runs programs"),
    ("both", "a.jsonl", "in danger"),
])  # fmt: skip
def test_unknown_and_unsafe_tasks_are_refused(installed, name: str, file: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Harness([TaskRequest("x", name, file and Path(file))], allow_code_execution=True)


def test_a_task_from_the_hub_that_is_out_of_reach_says_so(installed, dense, monkeypatch) -> None:
    import datasets

    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionError("no way there")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    with pytest.raises(UserError, match=r"cannot load 'quiz' from the hub: no way there.*give the task a `file`"):
        Harness([TaskRequest("x", "quiz")]).measure(load_model(dense), load_tokenizer(dense))


def test_the_standard_error_is_that_of_a_mean() -> None:
    assert mean_and_stderr([1.0, 0.0, 1.0, 0.0]) == (0.5, pytest.approx((1 / 3) ** 0.5 / 2))
    assert mean_and_stderr([1.0]) == (1.0, None)
