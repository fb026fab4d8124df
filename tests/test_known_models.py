"""Models are known again: what their experts are called after other tools have saved them, and what they say of a run's
held-out text, whatever their tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from btx.cli.main import app
from btx.data.held_out import held_out_documents
from btx.errors import CheckpointError, UserError
from btx.evaluation.compare import compare_models
from btx.evaluation.evaluate import ModelEntry, OtherEntry, evaluate_models
from btx.evaluation.other_tokenizer import in_tokens_of
from btx.files import read_json
from btx.mixing.drop import drop
from btx.mixing.extend import extend
from btx.mixing.mix import mix
from btx.mixing.moe_folder import MoeFolder
from btx.models.expert_names import expert_names, names_in, names_of_experts
from btx.models.loading import load_model
from btx.reporting.results import report_table, results_table
from btx.run_folder.folder import RunFolder
from btx.run_folder.other_models import add_other_models, check_other_models, forget_other_models, read_other_models
from tests.pico_models import SIZES, llama, mixtral, prepared_run, recipe, texts, tokenizer
from tests.pico_run import pico_recipe, run_here
from tests.tiny_moe import tiny_moe

MakeLlama = Callable[..., Path]
EXPERTS = ["birds", "tools", "generalist"]


def mixed(make_llama: MakeLlama, output: Path, **knobs: Any) -> Path:
    mix(make_llama("seed"), {"birds": make_llama("birds", 1), "tools": make_llama("tools", 2)}, output, **knobs)
    return output


def saved_by_transformers(folder: Path, target: Path) -> Path:
    """What a trainer leaves: a folder by `save_pretrained`, and no mix.json."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def test_experts_keep_their_names_through_other_tools(make_llama: MakeLlama, tmp_path: Path) -> None:
    moe = mixed(make_llama, tmp_path / "moe")
    assert read_json(moe / "config.json")["btx_experts"] == read_json(moe / "mix.json")["experts"] == EXPERTS
    again = saved_by_transformers(moe, tmp_path / "again")
    assert not (again / "mix.json").exists()
    assert names_of_experts(load_model(again), again) == MoeFolder.open(again).names == EXPERTS
    extend(again, "law", make_llama("law", 3), tmp_path / "four")
    drop(tmp_path / "four", "tools", tmp_path / "three")
    for folder, names in (("four", [*EXPERTS, "law"]), ("three", ["birds", "generalist", "law"])):
        found = (read_json(tmp_path / folder / file)[key]
                 for file, key in (("config.json", "btx_experts"), ("mix.json", "experts")))  # fmt: skip
        assert list(found) == [names, names]
    saved = saved_by_transformers(tmp_path / "three", tmp_path / "third")
    assert names_of_experts(load_model(saved), saved) == ["birds", "generalist", "law"]


def test_a_folder_that_only_btx_reads_has_names_too(make_llama: MakeLlama, tmp_path: Path) -> None:
    from btx.choices.routers import RoutingRule

    moe = mixed(make_llama, tmp_path / "moe", routing=RoutingRule("switch"))
    (moe / "mix.json").unlink()
    assert read_json(moe / "config.json")["model_type"] == "btx_mixtral"
    assert names_of_experts(load_model(moe), moe) == EXPERTS


def test_names_come_from_the_config_else_from_the_mix_else_they_are_numbers(tmp_path: Path) -> None:
    numbers = ["expert 0", "expert 1"]
    assert expert_names({}, 2, tmp_path) == expert_names({}, 2, None) == numbers
    (tmp_path / "finetune/model").mkdir(parents=True)
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix/mix.json").write_text('{"experts": ["math", "code"]}')
    assert expert_names({}, 2, tmp_path / "finetune/model") == ["math", "code"]
    assert expert_names({}, 3, tmp_path / "finetune/model") == [*numbers, "expert 2"]
    assert expert_names({"btx_experts": ["a", "b"]}, 2, tmp_path / "finetune/model") == ["a", "b"]
    for names in (["a"], ["a", "a"], ["a", 1], ["a", ""], ["a", "\x1b[31mb"], ["a", "b\n"], "ab", None):
        assert names_in({"btx_experts": names}, 2) is None


def character_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters: nothing in common with the run's."""
    characters = sorted({character for text in texts(40, rng_seed=1) + texts(40, rng_seed=2) for character in text})
    vocabulary = {entry: number for number, entry in enumerate(["<end>", "<unknown>", *characters])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", unk_token="<unknown>")
    made.save_pretrained(folder)
    return made


def character_llama(folder: Path) -> Path:
    """A Llama with that tokenizer that gives every character the same probability."""
    size = len(character_tokenizer(folder))
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, **SIZES))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(folder)
    return folder


def test_the_same_text_in_other_tokens_and_the_same_tokens_where_the_text_has_them(tmp_path: Path) -> None:
    run = prepared_run(tmp_path / "run")
    documents = held_out_documents(run, recipe(), "math", 300)
    other = character_tokenizer(tmp_path / "characters")
    for before, after in zip(documents, in_tokens_of(other, documents, tokenizer()), strict=True):
        text = tokenizer().decode(before.tokens[1:].tolist())
        assert after.bytes == before.bytes == len(text.encode())
        assert after.tokens[0] == other.eos_token_id
        assert len(after.tokens) == 1 + len(text)
    chatty = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, eos_token="7")  # as SFT leaves it
    assert all(new is old for new, old in zip(in_tokens_of(chatty, documents, tokenizer()), documents, strict=True))


def test_another_model_is_measured_beside_the_run_s_whatever_it_is(tmp_path: Path) -> None:
    run = prepared_run(tmp_path / "run")
    seed, btx = llama(tmp_path / "seed"), mixtral(tmp_path / "btx", experts=2)
    ours = {name: ModelEntry(path, tokens=1, flops=1.0, hours=0.0, inputs=name)
            for name, path in (("seed", seed), ("btx", btx))}  # fmt: skip
    others = {
        "copy": OtherEntry(btx, "copy"),
        "characters": OtherEntry(character_llama(tmp_path / "characters"), "characters"),
        "lfm": OtherEntry(tiny_moe("lfm2_moe", tmp_path / "lfm"), "lfm"),
        "broken": OtherEntry(tmp_path / "nothing", "gone"),
    }
    said: list[str] = []
    results = evaluate_models(run, recipe(), {**ours, **others}, log=said.append)["models"]
    assert list(results) == ["seed", "btx", "copy", "characters", "lfm"]
    assert any(line.startswith("broken: left out: ") and "nothing" in line for line in said)
    assert results["copy"]["domains"] == results["btx"]["domains"]
    assert results["copy"]["tasks"] == results["btx"]["tasks"]
    assert results["copy"]["other"] == {"path": str(btx)}
    assert results["copy"]["tokens"] is None
    size = len(PreTrainedTokenizerFast.from_pretrained(tmp_path / "characters"))
    for domain, found in results["characters"]["domains"].items():
        assert found["bytes"] == results["btx"]["domains"][domain]["bytes"]
        # each of the text's characters costs log2 of the vocabulary
        assert found["bits_per_byte"] * found["bytes"] == pytest.approx(found["tokens"] * np.log2(size), rel=1e-4)
        assert found["tokens"] > results["btx"]["domains"][domain]["tokens"]
    shown = json.loads((run / "evaluate/shown.json").read_text("utf-8"))
    assert all(losses.keys() == {"seed", "btx", "copy", "lfm"} for losses in shown["losses"].values())
    assert shown["loads"].keys() == {"btx"}  # of no other model is known that its experts are the run's
    report_table({"models": results})
    rows = {row.name: row for row in results_table({"models": results}).rows}
    assert "not the run's" in rows["lfm"].description
    assert rows["lfm"].costs[0].text == "–"
    difference = compare_models(run, "btx", "characters")["models"]["characters"]["mean"]["difference"]
    gap = results["btx"]["mean_bits_per_byte"] - results["characters"]["mean_bits_per_byte"]
    assert difference == pytest.approx(gap, abs=1e-3)
    said.clear()
    gone = replace(others["copy"], path=tmp_path / "moved")
    again = evaluate_models(run, recipe(), {**ours, "copy": gone}, log=said.append)["models"]
    assert again["copy"]["domains"] == results["copy"]["domains"]
    assert "copy: measured before, kept" in said


def test_names_beside_a_run_s_models_are_checked_and_kept(tmp_path: Path) -> None:
    model, settings = llama(tmp_path / "sft"), recipe()
    for name, message in (("seed", "the run has a model of this name"), ("expert__math", "the run has a model"),
                          ("a/b", "a name has letters"), ("", "a name has letters")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            check_other_models(settings, {name: model})
    with pytest.raises(CheckpointError, match="there is no such folder"):
        check_other_models(settings, {"sft": tmp_path / "nothing"})
    add_other_models(tmp_path, {"sft": model})
    before = read_other_models(tmp_path)
    assert before["sft"]["path"] == str(model)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert read_other_models(tmp_path)["sft"]["inputs"] != before["sft"]["inputs"]  # it was trained on
    now = read_other_models(tmp_path)
    add_other_models(tmp_path, {"dpo": model})
    model.rename(tmp_path / "moved")
    assert read_other_models(tmp_path)["sft"] == now["sft"]  # as it was, where it is gone
    forget_other_models(tmp_path, ["sft"])
    assert list(read_other_models(tmp_path)) == ["dpo"]
    with pytest.raises(UserError, match="no such model beside the run's; there are: dpo"):
        forget_other_models(tmp_path, ["sft"])


@pytest.mark.long
def test_a_finished_run_takes_other_models_and_stays_finished(tmp_path: Path) -> None:
    run, _ = run_here(pico_recipe(tmp_path))
    other = llama(tmp_path / "other")
    before = read_json(run.path / "evaluate/results.json")["models"]
    command = ["evaluate", str(run.path), "--model", f"a={other}", f"b={other}", "--json"]
    found = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)["models"]
    assert {name: found[name] for name in before} == before
    assert found["a"]["domains"] == found["b"]["domains"]
    opened = RunFolder.open(run.path)
    assert {opened.state(stage) for stage in opened.graph} == {"done"}
    assert "not the run" in (run.path / "report/index.html").read_text("utf-8")
    changed = pico_recipe(tmp_path, "run", "evaluate.tokens=400")
    run_here(changed, ["evaluate"])  # made anew, with the others
    again = read_json(run.path / "evaluate/results.json")["models"]
    assert again.keys() == found.keys()
    assert again["a"]["domains"] != found["a"]["domains"]
    CliRunner().invoke(app, ["evaluate", str(run.path), "--forget", "a"], catch_exceptions=False)
    assert read_json(run.path / "evaluate/results.json")["models"].keys() == found.keys() - {"a"}
