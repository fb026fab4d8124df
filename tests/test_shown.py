"""What the evaluation keeps for the report: bits of single tokens, answers with their experts, loads to compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btx.data.held_out import HeldOutDocument, held_out_documents, pack
from btx.evaluation.analyze import analyze, domain_routing
from btx.evaluation.bits_per_byte import bits_per_byte, token_bits
from btx.evaluation.evaluate import ModelEntry, evaluate_models
from btx.evaluation.routed_text import example_documents, name_of
from btx.evaluation.shown import routed_answer
from btx.evaluation.tasks import go_on
from btx.models.loading import load_model
from btx.recipe.schema import Recipe
from btx.reporting.run_files import read_run
from btx.run_folder.stages_of_recipe import build_graph
from tests.pico_models import llama, mixtral, prepared_run, recipe, tokenizer
from tests.pico_run import pico_recipe

Shown = dict[str, Any]


def settings(examples: int = 2) -> Recipe:
    """The task asks of math; general has none."""
    named = recipe(("{knowledge: {generate", "{math: {generate"))
    return named.model_copy(update={"analyze": named.analyze.model_copy(update={"examples": examples})})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ModelEntry], dict[str, Any], Shown]:
    """A run that was evaluated and analyzed: its folder, models, results.json and shown.json."""
    folder = tmp_path_factory.mktemp("shown")
    path = prepared_run(folder / "run")
    makers: dict[str, Callable[[Path], Path]] = {
        "seed": llama,
        "expert/math": lambda at: llama(at, rng_seed=1),
        "soup": lambda at: llama(at, rng_seed=2),
        "mix": lambda at: mixtral(at, experts=2, rng_seed=3),
        "btx": lambda at: mixtral(at, experts=2),
        "sft": lambda at: mixtral(at, experts=2, rng_seed=4),
    }
    models = {
        name: ModelEntry(make(folder / name.replace("/", "-")), tokens=0, flops=0.0, hours=0.0, inputs=name)
        for name, make in makers.items()
    }
    results = evaluate_models(path, settings(), models, log=lambda line: None)
    analyze(path, settings(), models["btx"].path, log=lambda line: None)
    return path, models, results, json.loads((path / "evaluate/shown.json").read_text("utf-8"))


def test_the_bits_of_single_tokens_add_up_to_those_of_the_document(run):
    path, models, _, _ = run
    model = load_model(models["btx"].path)
    documents = held_out_documents(path, settings(), "math", 400)
    lengths = [len(document.tokens) for document in documents]
    assert min(lengths) < 24 < max(lengths)  # one sequence and several
    whole = bits_per_byte(model, pack(documents, 24)).document_bits
    for document, bits in zip(documents, whole, strict=True):
        single = token_bits(model, [document], 24)[0]
        assert len(single) == len(document.tokens) - 1
        assert sum(single) == pytest.approx(bits, abs=1e-3 * len(single))


def test_the_bits_of_a_token_are_those_it_has_after_what_is_before_it(run):
    model = load_model(run[1]["seed"].path)
    ids = np.arange(1, 40)
    bits = token_bits(model, [HeldOutDocument(ids, 1)], 24)[0]
    for last in (2, 10, 24, 30):  # a sequence takes 24, the next one starts with the 24th
        start = 0 if last <= 24 else 23
        alone = HeldOutDocument(ids[start:last], 1)
        assert token_bits(model, [alone], 24)[0][-1] == pytest.approx(bits[last - 2], abs=2e-3)


def test_examples_of_the_report_have_the_bits_of_every_model(run):
    path, models, _, _ = run
    tokens = read_run(path).tokens
    assert len(tokens["examples"]) == 4
    for example in tokens["examples"]:
        assert example["losses"].keys() == models.keys()
        assert {len(bits) for bits in example["losses"].values()} == {len(example["tokens"])}
    first = example_documents(path, settings(), "math", 2)[0]
    shown = next(example for example in tokens["examples"] if example["document"] == name_of(first))
    assert shown["losses"]["sft"] == token_bits(load_model(models["sft"].path), [first], 24)[0]


def test_a_run_of_an_earlier_version_has_no_bits_of_tokens_and_no_answers(run, tmp_path):
    for name in ("routing.json", "tokens.json"):
        (tmp_path / "analyze").mkdir(exist_ok=True)
        (tmp_path / "analyze" / name).write_text((run[0] / "analyze" / name).read_text("utf-8"), "utf-8")
    old = read_run(tmp_path)
    assert "answers" not in old.tokens
    assert not any("losses" in example for example in old.tokens["examples"])
    assert "loads" not in old.routing


def test_documents_shown_by_a_smaller_number_are_among_those_of_a_larger_one(run):
    for domain in ("math", "general"):  # general is made of two sources
        names = [{name_of(document) for document in example_documents(run[0], settings(), domain, count)}
                 for count in range(6)]  # fmt: skip
        assert names[0] == set()
        assert all(fewer <= more for fewer, more in pairwise(names))
        assert len(names[5]) >= 5


def test_every_domain_has_answers_of_the_seed_its_expert_and_the_run_s_models(run):
    _, models, results, shown = run
    assert [(answer["domain"], answer.get("task")) for answer in shown["answers"]] == [
        *[("math", "math")] * 3, *[("general", None)] * 3
    ]  # fmt: skip
    for answer in shown["answers"]:
        expert = ["expert/math"] if answer["domain"] == "math" else []
        assert list(answer["answers"]) == ["seed", *expert, "btx", "sft"]
        assert "".join(answer["tokens"]) == answer["answers"]["btx"]
        assert len(answer["tokens"]) == len(answer["experts"]) == len(answer["gates"])
    asked = shown["answers"][1]
    for name in asked["answers"]:
        examples = results["models"][name]["tasks"]["math"]["examples"]
        one = next(example for example in examples if example["prompt"] == asked["prompt"])
        assert (asked["gold"], asked["answers"][name], asked["correct"][name]) == (
            one["gold"], one["output"], one["correct"],
        )  # fmt: skip
    document = shown["answers"][3]
    prompt = document["prompt"]
    assert document["answers"]["seed"] == go_on(load_model(models["seed"].path), tokenizer(), [prompt], 32)[0]
    texts = [tokenizer().decode(text.tokens[1:]) for text in example_documents(run[0], settings(), "general", 3)]
    assert any(text.startswith(prompt + document["gold"]) for text in texts)


def test_an_answer_s_tokens_have_the_experts_that_read_them_after_the_question(run):
    model, prompt, answer = load_model(run[1]["btx"].path), "the sum of three", " and four is seven"
    routed = routed_answer(model, tokenizer(), prompt, answer)
    whole = routed_answer(model, tokenizer(), "the", f" sum of three{answer}")
    assert "".join(routed["tokens"]) == answer
    assert routed["experts"] == whole["experts"][-len(routed["tokens"]) :]
    assert routed_answer(model, tokenizer(), prompt, "")["tokens"] == []


def test_loads_are_of_models_with_the_run_s_experts_on_the_same_text(run):
    path, models, _, shown = run
    assert list(shown["loads"]) == ["mix", "btx", "sft"]
    texts = held_out_documents(path, settings(), "math", 5_000)
    expected = domain_routing(load_model(models["mix"].path), texts, 24)[0].load()
    assert np.allclose(shown["loads"]["mix"]["math"], expected, atol=1e-4)
    assert read_run(path).routing["loads"] == shown["loads"]


def test_showing_more_measures_no_number_again(run):
    path, models, results, before = run
    lines: list[str] = []
    assert evaluate_models(path, settings(4), models, log=lines.append) == results
    assert [line for line in lines if "measured before, kept" not in line] == []
    after = json.loads((path / "evaluate/shown.json").read_text("utf-8"))
    assert before["losses"].items() < after["losses"].items()
    assert after["answers"] == before["answers"]
    assert after["loads"] == before["loads"]


def test_more_examples_than_are_scored_by_default_make_the_evaluation_stale_and_fewer_do_not(tmp_path):
    hashes = [
        {stage.name: stage.inputs for stage in build_graph(pico_recipe(tmp_path, "run", f"analyze.examples={count}"))}
        for count in (0, 3, 5)
    ]
    assert hashes[0]["evaluate"] == hashes[1]["evaluate"]
    assert {name for name in hashes[1] if hashes[1][name] != hashes[2][name]} == {"evaluate", "analyze", "report"}
