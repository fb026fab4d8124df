"""Routing: shares against the plain class, padding left out, dead experts, token texts."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from btx.choices.routers import RoutingRule
from btx.data.held_out import HeldOutDocument, held_out_documents, pack
from btx.data.token_texts import token_texts
from btx.errors import CheckpointError
from btx.evaluation.analyze import analyze, dead_experts, domain_routing, in_domain_layers
from btx.models.loading import load_model
from btx.moe.layer import moe_blocks
from btx.moe.routers import LayerRule
from btx.recipe.schema import Recipe
from btx.reporting.tokens import routed_text
from tests.pico_models import llama, mixtral, prepared_run, recipe, texts, tokenizer

THREE = ("train: {domains: [math]", "train: {domains: [math, general]")


def settings() -> Recipe:
    """math, general and the generalist: three experts."""
    return recipe(THREE)


def run_of(folder: Path, **model: int) -> tuple[Path, Path]:
    return prepared_run(folder / "run"), mixtral(folder / "moe", experts=3, **model)


def reference_logits(model_path: Path, document: HeldOutDocument, sequence_length: int) -> list[torch.Tensor]:
    """Router logits of a document's text tokens, a layer each, by the plain class, one window after the other."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64, experts_implementation="eager")
    ids = torch.from_numpy(document.tokens)
    windows = []
    for start in range(0, len(ids) - 1, sequence_length - 1):
        with torch.no_grad():
            output = model(input_ids=ids[None, start : start + sequence_length], output_router_logits=True)
        windows.append([logits[1:] for logits in output.router_logits])
    return [torch.cat(layer) for layer in zip(*windows, strict=True)]


def test_load_pairs_entropy_and_confidence_are_those_of_the_plain_class(tmp_path):
    run, model_path = run_of(tmp_path)
    found = analyze(run, settings(), model_path, log=lambda line: None)
    assert json.loads((run / "analyze/routing.json").read_text("utf-8")) == found
    for domain, routing in found["domains"].items():
        documents = held_out_documents(run, settings(), domain, settings().analyze.tokens)
        per_document = [reference_logits(model_path, document, 24) for document in documents]
        assert routing["tokens"] == sum(len(document.tokens) - 1 for document in documents)
        for layer, parts in enumerate(zip(*per_document, strict=True)):
            logits = torch.cat(parts)
            chosen, probs = logits.topk(2, dim=-1).indices, logits.softmax(dim=-1)
            load = [float((chosen == e).any(dim=1).float().mean()) / 2 for e in range(3)]
            assert routing["load"][layer] == pytest.approx(load)
            for a, b in combinations(range(3), 2):
                both = ((chosen == a).any(dim=1) & (chosen == b).any(dim=1)).float().mean()
                pair = f"{found['experts'][a]}+{found['experts'][b]}"
                assert routing["pairs"][pair][layer] == pytest.approx(float(both))
            entropy = -(probs * probs.log()).sum(dim=-1).mean()
            assert routing["entropy"][layer] == pytest.approx(float(entropy), rel=1e-4)
            assert routing["confidence"][layer] == pytest.approx(float(probs.amax(dim=-1).mean()), rel=1e-4)


def test_loads_and_pairs_sum_to_one_in_every_layer(tmp_path):
    run, model_path = run_of(tmp_path)
    for routing in analyze(run, settings(), model_path, log=lambda line: None)["domains"].values():
        assert [sum(load) for load in routing["load"]] == pytest.approx([1.0, 1.0])
        assert [sum(shares) for shares in zip(*routing["pairs"].values(), strict=True)] == pytest.approx([1.0, 1.0])


def test_padding_does_not_count(tmp_path):
    run, model_path = run_of(tmp_path)
    model, documents = load_model(model_path), held_out_documents(run, settings(), "math", 10**6)
    assert (pack(documents, 200).document_ids_BS < 0).any()
    (padded, _), tight = domain_routing(model, documents, 200), [domain_routing(model, [d], 200) for d in documents]
    assert padded.tokens == sum(len(document.tokens) - 1 for document in documents)
    assert torch.equal(padded.load_LE, sum(one.load_LE for one, _ in tight))


def test_an_expert_no_token_uses_is_dead(tmp_path):
    run, model_path = run_of(tmp_path)
    model = load_model(model_path)
    first, second = moe_blocks(model)
    with torch.no_grad():
        # The logits of experts 0 and 1 are each other's negative, so one of them beats the zero of expert 2.
        second.gate.weight[0], second.gate.weight[1], second.gate.weight[2] = 1.0, -1.0, 0.0
    first.rule = second.rule = LayerRule(RoutingRule(top_k=1))
    documents = held_out_documents(run, settings(), "math", 400)
    assert dead_experts([domain_routing(model, documents, 24)[0]]) == [[1, 2]]


def test_an_expert_of_one_domain_alone_is_not_dead(tmp_path):
    run, model_path = run_of(tmp_path)
    model = load_model(model_path)
    totals, _ = domain_routing(model, held_out_documents(run, settings(), "math", 400), 24)
    other, _ = domain_routing(model, held_out_documents(run, settings(), "general", 400), 24)
    totals.load_LE[:, 2] = 0
    assert dead_experts([totals]) == [[0, 2], [1, 2]]
    assert dead_experts([totals, other]) == []


def test_in_domain_layers_are_those_where_the_own_expert_leads():
    routing = {
        "experts": ["math", "code", "generalist"],
        "domains": {
            "math": {"load": [[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]]},
            "code": {"load": [[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]},
            "all": {"load": [[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]},
        },
    }
    assert in_domain_layers(routing) == {"math": [0], "code": []}
    assert in_domain_layers(routing, general="all") == {"math": [0], "code": [], "all": [1]}


def test_examples_hold_the_document_s_text_and_every_token_s_experts(tmp_path):
    run, model_path = run_of(tmp_path)
    analyze(run, settings(), model_path, log=lambda line: None)
    shown = json.loads((run / "analyze/tokens.json").read_text("utf-8"))
    assert (shown["layers"], shown["experts"]) == (2, ["math", "general", "generalist"])
    assert [example["domain"] for example in shown["examples"]] == ["math", "math", "general", "general"]
    everything = texts(40, rng_seed=1) + texts(40, rng_seed=2)
    for example in shown["examples"]:
        text = "".join(example["tokens"])
        assert any(document.startswith(text) for document in everything)
        assert len(example["tokens"]) == len(example["experts"]) == len(example["gates"])
        for experts, gates in zip(example["experts"], example["gates"], strict=True):
            assert [len(set(ids)) for ids in experts] == [2, 2]
            assert [sum(layer) for layer in gates] == pytest.approx([1.0, 1.0], abs=2e-4)
            assert all(first >= second for first, second in gates)
    assert all(routed_text("btx", example).token(0, 0, None).classes for example in shown["examples"])


def test_a_top_1_model_has_no_pairs(tmp_path):
    run, model_path = run_of(tmp_path, top_k=1)
    found = analyze(run, settings(), model_path, log=lambda line: None)
    assert all(routing["pairs"] == {} for routing in found["domains"].values())
    assert [sum(load) for load in found["domains"]["math"]["load"]] == pytest.approx([1.0, 1.0])


def test_a_dense_model_or_one_with_other_experts_is_refused(tmp_path):
    run, model_path = run_of(tmp_path)
    with pytest.raises(CheckpointError, match="no MoE layer"):
        analyze(run, settings(), llama(tmp_path / "dense"), log=lambda line: None)
    with pytest.raises(CheckpointError, match="3 experts; the recipe's are math, generalist"):
        analyze(run, recipe(), model_path, log=lambda line: None)


def test_a_character_of_several_tokens_comes_with_the_last_of_them():
    text = "x 🦊€ naïve\n"
    ids = tokenizer().encode(text, add_special_tokens=False)
    pieces = token_texts(tokenizer(), ids)
    assert len(pieces) == len(ids)
    assert "" in pieces
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(token_texts(tokenizer(), ids[:4])[:-1])


@pytest.mark.parametrize("rng_seed", range(3))
def test_token_texts_joined_are_the_document(rng_seed):
    for text in texts(5, rng_seed):
        assert "".join(token_texts(tokenizer(), tokenizer().encode(text, add_special_tokens=False))) == text
