"""Measuring: bits per byte against a slow reference, packing, exact match, kept results."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from btx.data.domains import Question
from btx.data.held_out import HeldOutDocument, held_out_documents, pack
from btx.data.mixture import NO_LABEL
from btx.data.token_files import DocumentEncoder
from btx.errors import DataError
from btx.evaluation import bits_per_byte as bits_per_byte_module
from btx.evaluation import tasks
from btx.evaluation.bits_per_byte import bits_per_byte, ratio
from btx.evaluation.evaluate import ModelEntry, evaluate_models
from btx.evaluation.questions import read_questions
from btx.evaluation.tasks import complete, exact_match, final_answer, gold_answer, has_answer_line
from btx.models import device as device_module
from btx.models import outputs
from btx.models.device import device_and_type
from btx.models.loading import load_model
from btx.recipe.evaluate import Task
from btx.recipe.schema import Recipe
from tests.pico_models import llama, mixtral, other_tokenizer, prepared_run, recipe, texts, tokenizer, write_token_file

MODELS = {"llama": llama, "mixtral": mixtral}


def documents(count: int = 12, rng_seed: int = 5) -> list[HeldOutDocument]:
    chosen = texts(count, rng_seed)
    encoded = DocumentEncoder(tokenizer())(chosen)
    return [HeldOutDocument(np.array(ids), len(text.encode())) for ids, text in zip(encoded, chosen, strict=True)]


def reference_bits(folder: Path, document: HeldOutDocument, sequence_length: int) -> float:
    """Bits of one document by the plain transformers class in float64, one window at a time, nothing packed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    ids, bits = torch.from_numpy(document.tokens), 0.0
    for start in range(0, len(ids) - 1, sequence_length - 1):
        window = ids[start : start + sequence_length]
        with torch.no_grad():
            log_probs = model(input_ids=window[None]).logits[0, :-1].log_softmax(dim=-1)
        bits -= float(log_probs.gather(1, window[1:, None]).sum()) / math.log(2)
    return bits


# --- bits per byte --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_bits_per_byte_equals_a_slow_float64_reference_one_document_at_a_time(kind, tmp_path):
    folder = MODELS[kind](tmp_path / kind)
    measured = bits_per_byte(load_model(folder), pack(documents(), 24))
    bits = [reference_bits(folder, document, 24) for document in documents()]
    size = sum(document.bytes for document in documents())
    assert measured.bits_per_byte == pytest.approx(sum(bits) / size, rel=1e-5)
    assert measured.bytes == size
    assert measured.tokens == sum(len(document.tokens) - 1 for document in documents())
    assert len(measured.document_bits) == 12


@pytest.mark.parametrize("kind", MODELS)
def test_bits_per_byte_in_bfloat16_are_those_in_float32_within_a_bfloat16_step(kind, tmp_path):
    folder, packed = MODELS[kind](tmp_path / kind), pack(documents(), 24)
    exact, rounded = (
        bits_per_byte(load_model(folder, dtype=dtype), packed) for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.bits_per_byte != exact.bits_per_byte
    assert rounded.bits_per_byte == pytest.approx(exact.bits_per_byte, rel=2**-8)


def test_models_are_measured_in_the_arithmetic_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(device_module, "has_bfloat16_units", lambda: True)

    def arithmetic(section: str, precision: str) -> torch.dtype:
        given = f"{section}:\n  precision: {precision}\n"
        return device_and_type(recipe((f"{section}:\n", given)))[1]

    assert arithmetic("evaluate", "bfloat16") == torch.bfloat16
    assert arithmetic("evaluate", "float32") == arithmetic("evaluate", "auto") == torch.float32


@pytest.mark.parametrize("kind", MODELS)
def test_neither_packing_nor_the_micro_batch_nor_the_head_s_slices_change_the_bits(kind, tmp_path, monkeypatch):
    model = load_model(MODELS[kind](tmp_path / kind))
    packed = pack(documents(), 24)
    assert max(len(row.unique()) for row in packed.document_ids_BS) > 2, "some rows should hold several documents"
    whole = bits_per_byte(model, packed).bits_per_byte
    monkeypatch.setattr(bits_per_byte_module, "MICRO_BATCH_TOKENS", 1)
    assert bits_per_byte(model, packed).bits_per_byte == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(outputs, "LOGITS_AT_ONCE", 1)
    assert bits_per_byte(model, packed).bits_per_byte == pytest.approx(whole, rel=1e-6)
    alone = [bits_per_byte(model, pack([document], 24)) for document in documents()]
    bits = sum(one.bits_per_byte * one.bytes for one in alone)
    assert bits / sum(one.bytes for one in alone) == pytest.approx(whole, rel=1e-6)


def test_the_ratio_s_standard_error_is_that_of_resampled_documents():
    rng = np.random.default_rng(0)
    size = rng.lognormal(6, 1, 300)
    bits = size * rng.normal(2, 0.3, 300)
    estimate, stderr = ratio(torch.tensor(bits), torch.tensor(size))
    drawn = rng.integers(0, 300, (4000, 300))
    bootstrap = (bits[drawn].sum(axis=1) / size[drawn].sum(axis=1)).std()
    assert estimate == pytest.approx(bits.sum() / size.sum())
    assert stderr == pytest.approx(bootstrap, rel=0.1)


def test_two_documents_of_one_size_have_the_standard_error_of_a_mean_and_one_document_has_none():
    assert ratio(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])) == (2.0, 1.0)
    assert ratio(torch.tensor([3.0]), torch.tensor([2.0])) == (1.5, None)


# --- packing --------------------------------------------------------------------------------------------------------


def test_packed_rows_hold_every_text_token_as_a_label_exactly_once():
    packed = pack(documents(), 24)
    for number, document in enumerate(documents()):
        labels = packed.labels_BS[(packed.document_ids_BS == number) & packed.scored_BS]
        assert sorted(labels.tolist()) == sorted(document.tokens[1:].tolist())
        text = packed.input_ids_BS[(packed.document_ids_BS == number) & packed.text_BS]
        assert sorted(text.tolist()) == sorted(document.tokens[1:].tolist())
    assert packed.input_ids_BS.shape[1] <= 24
    padding = packed.document_ids_BS < 0
    assert (packed.labels_BS[padding] == NO_LABEL).all()
    assert padding.float().mean() < 0.1


def test_positions_restart_at_every_piece_and_labels_are_the_next_tokens():
    packed = pack(documents(), 24)
    first = packed.position_ids_BS[:, 1:] == 0
    steps = packed.position_ids_BS[:, 1:] - packed.position_ids_BS[:, :-1]
    assert (steps[~first] == 1).all()
    scored = packed.scored_BS[:, :-1]
    assert torch.equal(packed.labels_BS[:, :-1][scored], packed.input_ids_BS[:, 1:][scored])
    assert not packed.scored_BS[:, :-1][first].any(), "the last position of a piece predicts nothing"


# --- which documents ------------------------------------------------------------------------------------------------


def test_held_out_documents_stand_in_proportion_to_the_sources_weights(tmp_path):
    run, settings = prepared_run(tmp_path), recipe()
    chosen = held_out_documents(run, settings, "general", 600)
    own = {document.tokens.tobytes() for document in held_out_documents(run, settings, "math", 10**6)}
    from_math = sum(len(document.tokens) for document in chosen if document.tokens.tobytes() in own)
    tokens = sum(len(document.tokens) for document in chosen)
    assert 300 < tokens <= 600
    assert 0.05 < from_math / tokens < 0.4


def test_held_out_documents_are_whole_distinct_and_at_least_one_a_source(tmp_path):
    run, settings = prepared_run(tmp_path), recipe()
    everything = held_out_documents(run, settings, "math", 10**6)
    assert len(everything) == 40
    assert len(held_out_documents(run, settings, "general", 1)) == 2
    decoded = [tokenizer().decode(document.tokens[1:]) for document in everything]
    assert decoded == texts(40, rng_seed=1)
    assert [document.bytes for document in everything] == [len(text.encode()) for text in decoded]


def test_a_trailing_end_of_text_token_is_left_out(tmp_path):
    write_token_file(tmp_path / "data/math/0/val", ["one", "two"], other_tokenizer(), rng_seed=0, source={})
    for document in held_out_documents(tmp_path, recipe(), "math", 100):
        assert document.tokens[0] == other_tokenizer().bos_token_id
        assert other_tokenizer().eos_token_id not in document.tokens


def test_a_domain_without_held_out_documents_is_named(tmp_path):
    write_token_file(tmp_path / "data/math/0/val", [], tokenizer(), rng_seed=0, source={})
    with pytest.raises(DataError, match=r"'math'.*held_out"):
        held_out_documents(tmp_path, recipe(), "math", 100)


# --- tasks ----------------------------------------------------------------------------------------------------------

PROMPTS = ["the sum of", "Question: is the sum of three and four 42 €\nAnswer:", "x", "def return x + 1 naïve café"]


@pytest.mark.parametrize("kind", MODELS)
def test_left_padding_gives_the_same_greedy_output_as_one_prompt_after_the_other(kind, tmp_path):
    model = load_model(MODELS[kind](tmp_path / kind))
    together = complete(model, tokenizer(), PROMPTS, "never written", 12)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float64, experts_implementation="eager")
    for prompt, output in zip(PROMPTS, together, strict=True):
        assert complete(model, tokenizer(), [prompt], "never written", 12) == [output]
        ids = DocumentEncoder(tokenizer())([prompt])[0]
        for _ in range(12):
            ids.append(int(plain(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer().eos_token_id:
                break
        assert output == tokenizer().decode(ids, skip_special_tokens=True).removeprefix(prompt)
    assert len(set(together)) == len(PROMPTS), "the outputs should differ, else the comparison says little"


def test_generation_stops_at_the_line_end_after_the_answer():
    assert not has_answer_line("two lines\nof work", "Answer:")
    assert not has_answer_line("work\nAnswer: 4", "Answer:")
    assert has_answer_line("work\nAnswer: 4\n", "Answer:")
    assert has_answer_line(" Paris\nQuestion", None)
    assert not has_answer_line("\n", None)


def test_a_row_ends_with_its_answer_line_while_the_others_go_on(tmp_path):
    model = load_model(llama(tmp_path / "llama"))
    free = complete(model, tokenizer(), texts(40, rng_seed=3, longest=8), "never written", 24)
    stopped = complete(model, tokenizer(), texts(40, rng_seed=3, longest=8), None, 24)
    assert any(text != whole for text, whole in zip(stopped, free, strict=True)), "no line ends: this test says nothing"
    for text, whole in zip(stopped, free, strict=True):
        assert whole.startswith(text)
        assert text == whole or has_answer_line(text, None)
        assert not has_answer_line(text[: text.rfind("\n")], None), "it should have ended at an earlier line end"


@pytest.mark.parametrize(("output", "marker", "answer"), [
    ("  4\n next", None, "4"),
    ("\n\n4 apples \t left\n", None, "4 apples left"),
    ("work\nAnswer: 3\nno\nAnswer:  4 \n5", "Answer:", "4"),
    ("no marker", "Answer:", None),
    ("", None, ""),
])  # fmt: skip
def test_the_answer_is_the_line_after_the_last_marker(output, marker, answer):
    assert final_answer(output, marker) == answer


def test_a_gold_answer_may_hold_the_marker_or_not():
    assert gold_answer("3 + 1 = 4\n#### 4", "####") == "4"
    assert gold_answer(" 4 ", "####") == "4"
    assert gold_answer("a\n b", None) == "a b"


def test_a_model_asked_for_its_own_outputs_is_always_right_and_for_others_never(tmp_path, monkeypatch):
    model, task = load_model(llama(tmp_path / "llama")), Task(generate="math", max_new_tokens=6)
    outputs = complete(model, tokenizer(), PROMPTS, None, 6)
    own = [Question(p, final_answer(o, None), "") for p, o in zip(PROMPTS, outputs, strict=True)]
    assert exact_match(model, tokenizer(), own, task).exact_match == 1.0
    half = [*own[:2], *[Question(question.prompt, "something else", "") for question in own[2:]]]
    monkeypatch.setattr(tasks, "BATCH_TOKENS", 1)
    found = exact_match(model, tokenizer(), half, task)
    assert (found.exact_match, found.stderr) == (0.5, 0.25)
    assert [answer["correct"] for answer in found.as_json()["examples"]] == [True, True, False, False]


def write(path: Path, text: str) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.jsonl.gz"])
def test_questions_are_read_from_jsonl_with_other_keys_and_numbers_as_answers(name, tmp_path):
    write(tmp_path / name, '{"q": "1 + 1\u2028=", "a": 2}\n\n{"q": "2 + 2 =", "a": "4"}\n{"q": "x", "a": "y"}\n')
    asked = read_questions(Task(path=name, prompt="q", answer="a", questions=2), rng_seed=0, root=str(tmp_path))
    assert [(question.prompt, question.answer) for question in asked] == [("1 + 1\u2028=", "2"), ("2 + 2 =", "4")]


@pytest.mark.parametrize(("text", "message"), [
    ('{"prompt": "a", "answer": "b"}\n{broken\n', r"tasks.jsonl:2: not JSON .*a question"),
    ('\n["a"]\n', r"tasks.jsonl:2: .*JSON object, not list"),
    ('{"question": "a", "answer": "b"}\n', r"tasks.jsonl:1: 'prompt' .* keys are: question, answer"),
    ('{"prompt": "a", "answer": " "}\n', r"tasks.jsonl:1: 'answer'"),
    ("\n", r"tasks.jsonl: no questions"),
])  # fmt: skip
def test_a_broken_line_is_named_with_file_and_number(text, message, tmp_path):
    write(tmp_path / "tasks.jsonl", text)
    with pytest.raises(DataError, match=message):
        read_questions(Task(path="tasks.jsonl"), rng_seed=0, root=str(tmp_path))


def test_missing_and_cut_off_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent.jsonl: cannot be read"):
        read_questions(Task(path="absent.jsonl"), rng_seed=0, root=str(tmp_path))
    whole = gzip.compress(b'{"prompt": "a", "answer": "b"}\n' * 100)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut.jsonl.gz: cannot be read"):
        read_questions(Task(path="cut.jsonl.gz"), rng_seed=0, root=str(tmp_path))


# --- a run's models -------------------------------------------------------------------------------------------------


def entries(folder: Path) -> dict[str, ModelEntry]:
    return {
        "seed": ModelEntry(llama(folder / "seed"), tokens=0, flops=0.0, hours=0.0, inputs="one"),
        "expert/math": ModelEntry(llama(folder / "math", rng_seed=1), tokens=5, flops=1e6, hours=0.5, inputs="two"),
        "btx": ModelEntry(mixtral(folder / "btx"), tokens=9, flops=2e6, hours=1.0, inputs="three"),
    }


@pytest.fixture
def measured(tmp_path) -> tuple[Path, Recipe, dict[str, ModelEntry], dict]:
    run, settings, models = prepared_run(tmp_path / "run"), recipe(), entries(tmp_path)
    return run, settings, models, evaluate_models(run, settings, models, log=lambda line: None)


def test_results_say_everything_the_contract_names(measured):
    run, settings, models, results = measured
    assert json.loads((run / "evaluate/results.json").read_text("utf-8")) == results
    assert list(results["models"]) == list(models)
    for name, model in results["models"].items():
        assert list(model["domains"]) == list(settings.data.domains)
        for found in model["domains"].values():
            assert found.keys() == {"bits_per_byte", "stderr", "tokens", "bytes"}
        task = model["tasks"]["knowledge"]
        assert task["questions"] == 7
        assert len(task["examples"]) == 6
        assert all(example.keys() == {"prompt", "output", "gold", "correct"} for example in task["examples"])
        values = [found["bits_per_byte"] for found in model["domains"].values()]
        assert model["mean_bits_per_byte"] == pytest.approx(sum(values) / len(values))
        bits = {domain: found["bits_per_byte"] for domain, found in model["domains"].items()}
        learned, kept = ([value for domain, value in bits.items() if (domain in settings.train.domains) is has_branch]
                         for has_branch in (True, False))  # fmt: skip
        assert model["learning_bits_per_byte"] == pytest.approx(sum(learned) / len(learned))
        assert model["keeping_bits_per_byte"] == pytest.approx(sum(kept) / len(kept))
        assert (model["tokens"], model["flops"], model["hours"]) == (
            models[name].tokens, models[name].flops, models[name].hours)  # fmt: skip
        assert model["eval_tokens_per_s"] > 0
    dense, moe = results["models"]["seed"], results["models"]["btx"]
    feed_forward = 2 * 3 * 32 * 48
    assert dense["active_params"] == dense["total_params"]
    assert moe["total_params"] == dense["total_params"] + 3 * feed_forward + 2 * 4 * 32
    assert moe["active_params"] == moe["total_params"] - 2 * feed_forward


def test_a_second_evaluation_measures_only_what_changed(measured, tmp_path):
    run, settings, models, before = measured
    lines: list[str] = []
    models["seed"] = ModelEntry(models["seed"].path, tokens=1, flops=7.0, hours=2.0, inputs="one")
    models["btx"] = ModelEntry(mixtral(tmp_path / "new", rng_seed=9), tokens=9, flops=2e6, hours=1.0, inputs="four")
    after = evaluate_models(run, settings, models, log=lines.append)
    assert [line for line in lines if "kept" in line] == [
        "seed: measured before, kept", "expert/math: measured before, kept"]  # fmt: skip
    assert after["models"]["seed"]["flops"] == 7.0
    assert after["models"]["seed"]["domains"] == before["models"]["seed"]["domains"]
    assert after["models"]["btx"]["domains"] != before["models"]["btx"]["domains"]


def test_other_held_out_text_or_other_questions_are_measured_anew(measured):
    run, settings, models, _ = measured
    lines: list[str] = []
    evaluate_models(run, recipe(("questions: 7", "questions: 6")), {"seed": models["seed"]}, log=lines.append)
    write_token_file(run / "data/math/0/val", texts(3, rng_seed=8), tokenizer(), rng_seed=0, source={})
    evaluate_models(run, settings, {"seed": models["seed"]}, log=lines.append)
    assert len(lines) == 2
    assert not any("kept" in line for line in lines)


def test_a_kill_loses_one_model_at_most(tmp_path):
    run, models = prepared_run(tmp_path / "run"), entries(tmp_path)

    def killed(line: str) -> None:
        if line.startswith("expert/math"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_models(run, recipe(), models, log=killed)
    assert not (run / "evaluate/results.json").exists()
    lines: list[str] = []
    evaluate_models(run, recipe(), models, log=lines.append)
    assert [line.split(":")[0] for line in lines if "kept" in line] == ["seed", "expert/math"]
