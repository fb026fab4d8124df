"""Prepare: documents of a recipe's domains → token files, once; budgets that the data cannot serve are refused."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from btx.data.mixture import Mixture
from btx.data.prepare import held_out_digests, prepare_domain, training_texts
from btx.data.sources import read_documents
from btx.data.token_files import TokenFile
from btx.data.tokenizer import train_tokenizer
from btx.errors import DataError
from btx.models.loading import load_tokenizer
from btx.planning.budgets import check_budget, check_budgets, check_held_out
from btx.recipe.mixtures import resolve
from btx.recipe.schema import Recipe
from btx.run_folder.folder import RunFolder
from btx.run_folder.stages_of_recipe import build_graph
from btx.stages import data as data_stage
from tests.pico_run import run_here

MATH = [f"{n} plus {n} is {2 * n}." for n in range(400)]
CODE = [f"def f{n}(x):\n    return x + {n}" for n in range(300)]
GENERAL = [f"The weather in town {n} was fine." for n in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small tokenizer."""
    return train_tokenizer(MATH + CODE + GENERAL, 300)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Recipe]:
    """Recipes over three files; the general domain takes from math."""
    for name, texts in {"math": MATH, "code": CODE, "general": GENERAL}.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def recipe(domains: dict[str, Any] | None = None, **sections: Any) -> Recipe:
        files = {"math": "math.jsonl", "code": "code.jsonl",
                 "general": [{"path": "general.jsonl", "weight": 3}, {"domain": "math", "weight": 1}]}  # fmt: skip
        training = {"tokens": 1000}
        value = {
            "name": "x",
            "run": str(tmp_path / "run"),
            "data": {"root": str(tmp_path), "domains": files | (domains or {}), "sequence_length": 16},
            "seed_model": {"config": {"model_type": "llama"}, "train": training, "tokenizer": {"vocab_size": 300}},
            "train": {**training, "domains": ["math", "code"]},
            "finetune": training,
        }
        return Recipe.model_validate(value | sections)

    return recipe


def prepare(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, out: Path, *, log: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """All domains, one after the other; domain → its summary."""
    return {name: prepare_domain(recipe, name, tokenizer, out / name, log=log) for name in recipe.data.domains}


def folders(out: Path, *domains: str) -> dict[str, Path]:
    """Domain → its prepared folder."""
    return {domain: out / domain for domain in domains or ("math", "code", "general")}


def silent(line: str) -> None:
    """A log nobody reads."""


def test_each_own_source_has_its_token_files(
    make: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    recipe = make()
    summary = prepare(recipe, tokenizer, tmp_path / "data", log=silent)
    folders = sorted(
        str(path.parent.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("index.json")
    )
    assert folders == [f"{domain}/0/{split}" for domain in ("code", "general", "math") for split in ("train", "val")]
    for split in ("train", "val"):
        file = TokenFile.open(tmp_path / "data" / "math" / "0" / split)
        source = recipe.data.domains["math"].sources[0]
        texts = list(read_documents(source, split, domain="math", data=recipe.data, rng_seed=0))  # type: ignore[arg-type]
        starts = file.document_starts
        decoded = [tokenizer.decode(file.tokens[a + 1 : b]) for a, b in pairwise(starts)]
        assert decoded == texts
    assert summary["math"]["documents"] == 400
    assert summary["general"]["documents"] == 300  # its own: those it takes from math are math's
    assert summary["math"]["bytes"] == sum(map(len, MATH))
    assert summary["code"]["train_tokens"] > 10 * summary["code"]["val_tokens"] > 0


def test_the_token_files_feed_a_mixture(
    make: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    recipe = make()
    prepare(recipe, tokenizer, tmp_path / "data", log=silent)
    components = [
        (name, TokenFile.open(tmp_path / "data" / path / "train"), weight)
        for name, path, weight in resolve(recipe, {"general": 1.0})
    ]
    batch = Mixture(components, 16, 0).batch(0, 100)
    text = "".join(tokenizer.batch_decode(batch.input_ids))
    assert text.count("weather") > 2 * text.count("plus") > 0


def test_what_is_unchanged_is_not_read_again(
    make: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    out, lines = tmp_path / "data", []

    def made(recipe: Recipe, by: PreTrainedTokenizerFast = tokenizer) -> list[str]:
        lines.clear()
        prepare(recipe, by, out, log=lines.append)
        return [line.split(":")[0] for line in lines if not line.endswith("unchanged")]

    everything = ["math/0", "code/0", "general/0"]
    assert made(make()) == everything
    assert made(make()) == []
    assert made(make({"general": [{"path": "general.jsonl", "weight": 9}, {"domain": "math"}]})) == []
    assert made(make({"code": {"path": "code.jsonl", "max_bytes": 5000}})) == ["code/0"]
    assert made(make({"code": "code.jsonl"})) == ["code/0"]
    path = tmp_path / "math.jsonl"
    path.write_text(path.read_text().replace("399 plus", "398 plus"))
    assert made(make()) == ["math/0"]
    os.utime(path, ns=(0, 0))
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "code.jsonl").read_bytes())
    assert made(make()) == made(make({"code": "moved.jsonl"})) == []
    (out / "general" / "0" / "val" / "index.json").unlink()
    assert made(make()) == ["general/0"]
    with open(out / "general" / "0" / "train" / "tokens.bin", "ab") as tokens:
        tokens.write(b"x")
    assert made(make()) == ["general/0"]
    assert made(make(), by=train_tokenizer(CODE, 280)) == everything


def test_preparing_again_gives_the_same_bytes(
    make: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    recipe = make({"math": {"generate": "math", "max_bytes": 20_000}})
    for name in ("a", "b"):
        prepare(recipe, tokenizer, tmp_path / name, log=silent)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(files) == 30
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_failed_source_leaves_no_token_file(
    make: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with open(tmp_path / "code.jsonl", "a") as file:
        file.write("\n{oops")
    with pytest.raises(DataError, match=r"^domain 'code': .*code\.jsonl, line 301: not JSON"):
        prepare(make(), tokenizer, tmp_path / "data", log=silent)
    assert not list((tmp_path / "data" / "code").rglob("*.*"))
    with pytest.raises(DataError, match=r"^domain 'code': .*nothing\.jsonl: no such file"):
        prepare(make({"code": "nothing.jsonl"}), tokenizer, tmp_path / "data", log=silent)


def test_the_tokenizer_learns_from_train_documents_in_the_seed_mixture(make: Callable[..., Recipe]) -> None:
    recipe = make()
    held_out = {
        text
        for domain in ("math", "general")
        for text in read_documents(recipe.data.domains[domain].sources[0], "val", domain=domain, data=recipe.data,
                                   rng_seed=0)
    }  # fmt: skip
    texts = list(training_texts(recipe))
    assert set(texts) == set(MATH + GENERAL) - held_out
    limit = {**recipe.seed_model.model_dump(), "tokenizer": {"vocab_size": 300, "train_bytes": 4000}}
    texts = list(training_texts(make(seed_model=limit)))
    size = {text: len(text) for text in texts}
    assert 4000 <= sum(size.values()) < 4100
    assert sum(size[text] for text in texts if "weather" in text) == pytest.approx(3000, abs=50)


def test_too_few_held_out_documents_are_refused(
    make: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "val.jsonl").write_text('{"text": "short"}')
    recipe = make({"code": {"path": "code.jsonl", "held_out": "val.jsonl"}})
    prepare(recipe, tokenizer, tmp_path / "data", log=silent)
    check_held_out(recipe, folders(tmp_path / "data"), "math")
    with pytest.raises(DataError, match=r"domain 'code': 1 held-out documents with \d tokens; needed: at least 1 with"):
        check_budgets(recipe, folders(tmp_path / "data"))


def test_held_out_text_for_a_domain_without_documents_of_its_own_is_refused(
    make: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    recipe = make({"general": {"sources": [{"domain": "math"}], "held_out": "code.jsonl"}})
    with pytest.raises(DataError, match="domain 'general': `held_out` needs a source of the domain's own"):
        prepare(recipe, tokenizer, tmp_path / "data", log=silent)


def test_a_budget_of_more_than_fifty_epochs_is_refused_with_both_numbers(
    make: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    recipe, out = make(), tmp_path / "data"
    have = prepare(recipe, tokenizer, out, log=silent)["code"]["train_tokens"]
    check_budget(recipe, folders(out), {"code": 1.0}, 50 * have, "train.tokens")
    with pytest.raises(DataError) as caught:
        check_budget(recipe, folders(out), {"code": 1.0}, 51 * have, "train.tokens")
    message = str(caught.value)
    assert f"domain 'code', source 0: {have:,} training tokens, but train.tokens = {51 * have:,} takes" in message
    assert "51 epochs" in message
    check_budget(recipe, folders(out), {"code": 0.1, "math": 0.9}, 60 * have, "train.tokens")
    check_budgets(recipe, folders(out))
    with pytest.raises(DataError, match=r"finetune\.tokens = 1,000,000,000"):
        check_budgets(make(finetune={"tokens": 10**9}), folders(out))
    long = recipe.data.model_dump() | {"sequence_length": have}
    with pytest.raises(DataError, match=rf"fewer than one training sequence .* \+ 1 = {have + 1:,}"):
        check_budget(make(data=long), folders(out), {"code": 1.0}, 100, "train.tokens")


def test_a_domain_is_checked_with_what_is_its_own(
    make: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    recipe, out = make(train={"tokens": 10**9, "domains": ["math", "code"]}), tmp_path / "data"
    prepare_domain(recipe, "general", tokenizer, out / "general", log=silent)
    with pytest.raises(DataError, match=r"domain 'general', source 0: .* train\.tokens = 1,000,000,000 takes"):
        check_budgets(recipe, folders(out, "general"))  # the branches replay it; math and code are not there yet
    check_budgets(make(), folders(out, "general"))


def test_a_runs_data_stages_leave_a_tokenizer_and_token_files(make: Callable[..., Recipe]) -> None:
    run, lines = run_here(make(), ["data"])
    assert {stage.name for stage in run.graph.data} == {
        f"data/{name}" for name in ("tokenizer", "math", "code", "general")
    }
    assert (run.path / "data" / "tokenizer" / "tokenizer.json").is_file()
    assert all(run.state(stage) == "done" for stage in run.graph.data)
    assert lines[0].startswith("tokenizer: training 300 entries")
    _, again = run_here(make(), ["data"])
    assert [line.split(": ")[1] for line in again] == ["already done, skipped"] * 4


# What any domain holds out is in no domain's training text


def texts_of(folder: Path, tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """The documents of a token file, white space apart."""
    file = TokenFile.open(folder)
    documents = (tokenizer.decode(file.tokens[a + 1 : b]) for a, b in pairwise(file.document_starts))
    return {" ".join(text.split()) for text in documents}


def test_what_is_left_out_is_counted_and_told(make: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "law").mkdir()
    lines = [json.dumps({"text": text}) for text in [*CODE, "", " \n", CODE[0], CODE[1], CODE[1]]]
    (tmp_path / "law" / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    for name in ("b.csv", "README.txt", ".hidden.jsonl", "c.jsonl.bz2"):
        (tmp_path / "law" / name).write_text("x")
    recipe = make({"law": "law"}, train={"tokens": 1000, "domains": ["law", "math"]})
    run, told = run_here(recipe, ["data"])
    assert run.done("data/law")["skipped"] == {"law/0": {"empty": 2, "duplicates": 3}}
    assert run.done("data/law")["not_read"] == {"law/0": ["README.txt", "b.csv", "c.jsonl.bz2"]}
    assert run.done("data/math")["skipped"] == run.done("data/math")["not_read"] == {}
    assert any(line.endswith("law/0: left out: 3 duplicates, 2 empty") for line in told)
    assert any(line.endswith("law/0: files that are not read: README.txt, b.csv, c.jsonl.bz2") for line in told)
    tokenizer, out = load_tokenizer(run.path / "data" / "tokenizer"), tmp_path / "again"
    first = prepare(recipe, tokenizer, out, log=silent)
    assert prepare(recipe, tokenizer, out, log=silent) == first  # nothing is read again, the counts are still there


def test_held_out_text_is_in_no_domains_training_text(make: Callable[..., Recipe], tmp_path: Path) -> None:
    held_out = [f"Case {n} was heard on Monday." for n in range(50)]
    for name, texts in {
        "law/train.jsonl": [f"Statute {n} is in force." for n in range(200)],
        "law/val.jsonl": held_out,
        "web.jsonl": GENERAL + [f"  {text.replace(' ', chr(10), 1)}\t" for text in held_out[:40]],
        "cases.jsonl": [f"Opinion {n} was joined." for n in range(100)] + held_out[10:],
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(json.dumps({"text": text}) for text in texts))
    recipe = make(
        {"law": ["law", "cases.jsonl"], "general": "web.jsonl"}, train={"tokens": 1000, "domains": ["law", "math"]}
    )
    run, lines = run_here(recipe, ["data"])
    tokenizer = load_tokenizer(run.path / "data" / "tokenizer")
    data, domains = run.path / "data", recipe.data.domains
    val, train = (
        {f"{name}/{number}": texts_of(data / name / str(number) / split, tokenizer)
         for name, domain in domains.items() for number, source in enumerate(domain.sources) if source.domain is None}
        for split in ("val", "train")
    )  # fmt: skip
    assert val["law/0"] == set(held_out)
    assert {name: texts & set().union(*val.values()) for name, texts in train.items()} == {
        name: set() for name in train
    }
    taken_out = {name: run.done(f"data/{name}")["taken_out"]["training"] for name in domains}
    assert taken_out["general"] == {"general/0": {"law": 40 - len(val["general/0"] & set(held_out))}}
    assert taken_out["law"] == {"law/1": {"law": 40 - len(val["law/1"] & set(held_out))}}
    assert any("law/1: " in line and "training documents were taken out: law holds them out" in line for line in lines)
    assert len(train["general/0"]) > 250


def test_many_domains_are_each_read_once_for_what_they_hold_out(
    make: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"d{n}" for n in range(4)]
    for n, name in enumerate(names):
        texts = [f"{name}, number {k}." for k in range(400)] + GENERAL[n * 20 : n * 20 + 60]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    domains = {name: {"path": f"{name}.jsonl"} for name in names} | {"general": "general.jsonl"}
    recipe = make(domains, train={"tokens": 1000, "domains": names[:2]})
    read = Counter[str]()

    def counted(recipe: Recipe, domain: str) -> np.ndarray:
        read[domain] += 1
        return held_out_digests(recipe, domain)

    monkeypatch.setattr(data_stage, "held_out_digests", counted)
    run, _ = run_here(recipe, ["data"])
    assert max(read.values()) == 1
    kept = {name: run.done(f"data/{name}") for name in recipe.data.domains}
    monkeypatch.setattr(data_stage, "_held_out", lambda run, domain, stage: held_out_digests(run.recipe, domain))
    again, _ = run_here(recipe.model_copy(update={"run": str(tmp_path / "again")}), ["data"])
    for name, facts in kept.items():
        assert again.done(f"data/{name}")["taken_out"] == facts["taken_out"]
        for split in ("train", "val"):
            assert same_file(run, again, f"data/{name}/0/{split}/tokens.bin")


def same_file(one: RunFolder, other: RunFolder, name: str) -> bool:
    return (one.path / name).read_bytes() == (other.path / name).read_bytes()


def test_what_a_later_domain_holds_out_was_in_no_models_training(make: Callable[..., Recipe], tmp_path: Path) -> None:
    run_here(make(), ["data"])
    text = [json.dumps({"text": text}) for text in (*GENERAL[:30], *(f"A new text, number {n}." for n in range(60)))]
    (tmp_path / "new-val.jsonl").write_text("\n".join(text))
    (tmp_path / "new.jsonl").write_text("\n".join(json.dumps({"text": f"News {n}."}) for n in range(300)))
    recipe = make({"new": {"path": "new.jsonl", "held_out": "new-val.jsonl"}})
    run, lines = run_here(recipe, ["data"])
    assert [line for line in lines if "already done" in line] == [
        f"data/{name}: already done, skipped" for name in ("tokenizer", "math", "code", "general")
    ]
    tokenizer = load_tokenizer(run.path / "data" / "tokenizer")
    held_out, read = (texts_of(run.path / "data" / name, tokenizer) for name in ("new/0/val", "general/0/train"))
    assert len(held_out) >= 60
    assert not held_out & read
    assert run.done("data/new")["taken_out"]["held_out"] == {"new/0": {"general": 90 - len(held_out)}}
    assert run.state(run.graph["data/new"]) == "done"


def test_a_new_tokenizer_is_written_under_a_class_that_transformers_4_knows(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from btx.data.tokenizer import save_tokenizer, train_tokenizer

    tokenizer = train_tokenizer(["one two three 42", "deux trois"], 300)
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("one 42 trois")["input_ids"] == tokenizer("one 42 trois")["input_ids"]
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_domains_that_are_made_anew_together_are_kept_apart_from_what_each_holds_out_now(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    shared = [f"Shared text, number {n}." for n in range(300)]
    for name in ("math", "code", "general"):
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write(
                "".join("\n" + json.dumps({"text": text.replace(" ", "  " * (1 + len(name)))}) for text in shared)
            )
    recipe = make({"general": "general.jsonl"})
    run_here(recipe, ["data"])
    more = recipe.model_copy(update={"data": recipe.data.model_copy(update={"held_out": 0.3})})
    run, _ = run_here(more, ["data"])
    data = run.path / "data"
    tokenizer = load_tokenizer(data / "tokenizer")
    held_out = set().union(*(texts_of(data / name / "0" / "val", tokenizer) for name in ("math", "code", "general")))
    for name in ("math", "code", "general"):
        assert not held_out & texts_of(data / name / "0" / "train", tokenizer), name
        assert run.done(f"data/{name}")["taken_out"]["training"][f"{name}/0"]


def test_a_dataset_in_a_folder_is_what_its_files_hold(make: Callable[..., Recipe], tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in CODE))
    before = build_graph(make({"code": {"hub": "set"}}))["data/code"].inputs
    (tmp_path / "set").rename(tmp_path / "moved")
    assert build_graph(make({"code": {"hub": "moved"}}))["data/code"].inputs == before
    (tmp_path / "moved" / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in CODE[1:]))
    assert build_graph(make({"code": {"hub": "moved"}}))["data/code"].inputs != before
