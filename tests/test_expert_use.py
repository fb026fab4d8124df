"""What the routing of a run says of its experts: tokens and classes, lag after a change of domain, experts dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from btx.data.held_out import HeldOutDocument, pack
from btx.evaluation.analyze import RoutingTotals, analyze, least_used_first
from btx.evaluation.bits_per_byte import bits_per_byte
from btx.evaluation.kept_experts import POINTS, TOKENS, documents_for_curve, kept_curve
from btx.evaluation.lag import AFTER, BEFORE, Change, changing_documents, lag
from btx.evaluation.routing_statistics import RoutedTokens
from btx.evaluation.token_classes import CLASSES, texts_of_vocabulary, token_class
from btx.evaluation.used_for import used_for
from btx.models.loading import load_model
from btx.moe.layer import moe_blocks
from tests.pico_models import mixtral, prepared_run, recipe, tokenizer, write_token_file

OLD, NEW = 40, 41
"""Two tokens, each with an expert of its own in `domain_router`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixtral(tmp_path_factory.mktemp("models") / "two", experts=2, top_k=1)


@pytest.fixture(scope="module")
def domain_router(folder: Path):
    """A Top-1 model whose router picks expert 0 for the token OLD and expert 1 for NEW, in both layers."""
    model = load_model(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()  # a token is all that a position knows
            layer.post_attention_layernorm.weight.fill_(1.0)
        for block in moe_blocks(model):
            block.experts.down_proj.zero_()
            old, new = model.model.embed_tokens.weight[[OLD, NEW]]
            old.copy_(torch.cat([torch.ones(1), torch.zeros(31)]))
            new.copy_(-torch.cat([torch.ones(1), torch.zeros(31)]))
            model.model.embed_tokens.weight[OLD], model.model.embed_tokens.weight[NEW] = old, new
            block.gate.weight.zero_()
            block.gate.weight[0, 0] = 1.0
    return model


# --- classes of tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "kind"), [
    (" the", "word start"), ("The", "word start"), ("ing", "word part"), ("naïve", "word part"), (" été", "word start"),
    ("12", "number"), (" 7", "number"), ("x1", "word part"), (".", "punctuation"), (" (", "punctuation"),
    ("==", "code symbol"), (" {", "code symbol"), ("):", "punctuation"), ("()", "punctuation"), ("+=", "code symbol"),
    ("  ", "space"), ("\t", "space"), ("\n", "line end"), ("\n    ", "line end"), ("", "other"), ("\ufffd", "other"),
    ("😀", "other"), ("中文", "word part"), ("。", "punctuation"),
])  # fmt: skip
def test_a_token_has_the_class_of_what_it_holds(text, kind):
    assert token_class(text) == kind
    assert kind in CLASSES


def test_single_tokens_keep_the_space_in_front_and_special_ones_have_no_text():
    known = tokenizer()
    ids = known.encode("x the", add_special_tokens=False)
    texts = texts_of_vocabulary(known, [*ids, known.eos_token_id])
    assert "".join(texts) == "x the"
    assert texts[-1] == ""


# --- what experts are used for --------------------------------------------------------------------------------------


def used(ids: list[int], *layers: list[int]) -> Any:
    """What experts of a Top-1 model are used for: the tokens `ids`, and of each layer the experts they go to."""
    known = tokenizer()
    class_V = np.array([CLASSES.index(token_class(text)) for text in texts_of_vocabulary(known, range(len(known)))])
    nowhere_T = np.zeros(len(ids), np.int64)
    routed = RoutedTokens(nowhere_T, nowhere_T, np.array(ids), np.array(layers, np.int16).T[:, :, None])
    return used_for(routed, known, ["math", "code"], class_V)


def test_an_expert_is_used_for_the_tokens_it_gets_more_often_than_an_even_load_says():
    the, four = (tokenizer().encode(text, add_special_tokens=False)[0] for text in ("the", "4"))
    # Layer 1 sends every "the" to expert 0; layer 2 half of them. Every "4" goes to expert 1.
    found = used([the] * 10 + [four] * 10, [0] * 10 + [1] * 10, [0] * 5 + [1] * 15)
    the_text, share, occurrences = found["math"]["tokens"][0]
    assert ("the".startswith(the_text), share, occurrences) == (True, 0.75, 10)
    assert found["code"]["tokens"] == [["4", 1.0, 10]]
    assert found["math"]["classes"]["word part"] == 1.0
    assert found["code"]["classes"]["number"] == pytest.approx(20 / 25)
    assert sum(found["code"]["classes"].values()) == pytest.approx(1.0)


def test_a_token_that_occurs_seldom_says_nothing_of_an_expert():
    assert used([OLD] * 9, [0] * 9)["math"]["tokens"] == []


# --- lag ------------------------------------------------------------------------------------------------------------


def test_a_router_that_goes_by_the_domain_changes_at_once(domain_router):
    tokens = np.array([0, *[OLD] * 10, *[NEW] * 6])
    found = lag(domain_router, [Change(tokens, at=11, old=0, new=1)] * 2)
    assert found["positions"] == list(range(-10, 6))
    assert found["old"] == [1.0] * 10 + [0.0] * 6
    assert found["new"] == [0.0] * 10 + [1.0] * 6
    assert found["documents"] == 2


def test_the_lag_is_a_mean_over_documents_and_leaves_out_what_few_have(domain_router):
    late = np.array([0, *[OLD] * 30, *[NEW] * 90])
    changes = [Change(late, at=31, old=0, new=1), Change(late, at=30, old=0, new=1),
               Change(late[:34], at=31, old=0, new=1)]  # fmt: skip
    found = lag(domain_router, changes)
    assert found["positions"] == list(range(-BEFORE, AFTER))
    at = {p: (old, new) for p, old, new in zip(found["positions"], found["old"], found["new"], strict=True)}
    assert at[-1] == (1.0, 0.0)
    assert at[0] == pytest.approx((1 / 3, 2 / 3), abs=1e-4)  # the second one changes a token later than it says
    assert at[1] == (0.0, 1.0)
    assert lag(domain_router, [*changes[2:] * 2, changes[0]])["positions"][-1] == 2


def test_documents_change_between_every_two_experts_in_both_directions():
    texts = {0: ["x x x x", "x x 7 7"], 2: ["the sum of three", "and four"], 3: ["42 42"]}
    changes = changing_documents(texts, tokenizer(), 12)
    assert sorted((change.old, change.new) for change in changes) == sorted(
        [(a, b) for a in texts for b in texts if a != b] * 2
    )
    first = changes[0]
    assert tokenizer().decode(first.tokens[1 : first.at]) == "x x\n\n"
    assert tokenizer().decode(first.tokens[first.at :]) == "of three"
    assert first.tokens[0] == tokenizer().eos_token_id


# --- experts dropped ------------------------------------------------------------------------------------------------


def test_without_an_expert_the_others_read_its_tokens(folder):
    model, packed = load_model(folder), {"math": pack([HeldOutDocument(np.arange(60), 100)], 24)}
    curve = kept_curve(model, packed, ["math", "generalist"], order=[0, 1])
    assert [point["experts"] for point in curve] == [["math", "generalist"], ["generalist"]]
    whole = bits_per_byte(model, packed["math"]).bits_per_byte
    with torch.no_grad():
        for block in moe_blocks(model):  # a Top-1 gate is 1: with two equal experts it does not matter who reads
            for weights in block.experts.parameters():
                weights[0] = weights[1]
    alone = bits_per_byte(model, packed["math"]).bits_per_byte
    assert curve[0]["domains"] == {"math": pytest.approx(whole)}
    assert curve[1]["domains"] == {"math": pytest.approx(alone, rel=1e-5)}
    assert curve[1]["mean"] == curve[1]["domains"]["math"]
    assert abs(whole - alone) > 1e-3


def test_of_many_experts_several_are_dropped_at_once(tmp_path):
    model = load_model(mixtral(tmp_path / "many", experts=40))
    names = [f"e{i}" for i in range(40)]
    curve = kept_curve(model, {"math": pack([HeldOutDocument(np.arange(9), 9)], 24)}, names, list(range(40)))
    kept = [len(point["experts"]) for point in curve]
    assert (kept[0], kept[-1], len(kept)) == (40, 1, POINTS)
    assert kept == sorted(kept, reverse=True)
    assert curve[-1]["experts"] == ["e39"]


def test_the_least_used_expert_is_that_of_the_least_load_each_domain_counting_the_same():
    long, short = RoutingTotals(1, 3), RoutingTotals(1, 3)
    long.load_LE += torch.tensor([[100.0, 900.0, 0.0]])
    short.load_LE += torch.tensor([[1.0, 0.0, 9.0]])
    assert least_used_first([long, short]) == [0, 1, 2]


# --- in a run -------------------------------------------------------------------------------------------------------


def test_a_run_s_routing_says_all_of_it(tmp_path):
    settings = recipe(("train: {domains: [math]", "train: {domains: [math, general]"))
    run = prepared_run(tmp_path / "run")
    found = analyze(run, settings, mixtral(tmp_path / "moe", experts=3), log=lambda line: None)
    experts = ["math", "general", "generalist"]
    assert list(found["used_for"]) == experts
    assert found["lag"]["documents"] > 0
    assert 0 in found["lag"]["positions"]
    assert all(0 <= share <= 0.5 for share in found["lag"]["old"] + found["lag"]["new"])  # Top-2: half of the load
    assert [len(point["experts"]) for point in found["kept"]] == [3, 2, 1]
    assert {tuple(point["domains"]) for point in found["kept"]} == {("math", "general")}


def test_where_a_domain_has_no_text_to_halve_there_is_no_lag(tmp_path):
    run = prepared_run(tmp_path / "run")
    write_token_file(run / "data/math/0/val", ["无空格的文本"] * 3, tokenizer(), rng_seed=0, source={})
    assert "lag" not in analyze(run, recipe(), mixtral(tmp_path / "two", experts=2), log=lambda line: None)


def test_the_curve_reads_the_start_of_a_long_document(tmp_path):
    text = "the sum of three and four is seven " * 400
    write_token_file(tmp_path / "data/math/0/val", [text], tokenizer(), rng_seed=0, source={})
    (document,) = documents_for_curve(tmp_path, recipe(), "math", tokenizer())
    start = tokenizer().decode(document.tokens[1:])
    assert len(document.tokens) == 1 + TOKENS
    assert text.startswith(start)
    assert document.bytes == len(start)
