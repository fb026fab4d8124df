"""The mixed set: documents that switch domain, joined from halves of held-out ones."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations

import pytest

from btx.errors import DataError, RecipeError
from btx.evaluation.evaluate import ModelEntry, evaluate_models
from btx.evaluation.mixed_set import JOINT, joined_halves, mixed_documents, split_in_the_middle
from btx.recipe.loading import parse_recipe
from btx.recipe.schema import Recipe
from tests.pico_models import RECIPE, llama, other_tokenizer, prepared_run, recipe, texts, tokenizer, write_token_file

# --- halves of held-out documents -----------------------------------------------------------------------------------

DOMAINS = {name: [f"{name} one {i} | {name} two {i}" for i in range(7)] for name in "abcd"}


def test_every_pair_of_domains_comes_equally_often_in_both_orders():
    joined = joined_halves(DOMAINS, 36)
    orders = Counter((text[0], text.split(JOINT)[1].split()[-3]) for text in joined)
    pairs = Counter(frozenset(pair) for pair in orders.elements())
    assert pairs == {frozenset(pair): 6 for pair in combinations("abcd", 2)}
    assert set(orders.values()) == {3}
    assert len(set(joined)) == 36
    assert joined == joined_halves(DOMAINS, 36)


@pytest.mark.parametrize(("text", "halves"), [
    ("one two three four", ("one two", "three four")),
    ("a line\nthe second\n  indented here\nlast", ("a line\nthe second", "  indented here\nlast")),
    ("a\nlong line without any other line end in it", ("a\nlong line without any", "other line end in it")),
    ("inseparable", ("inseparable", "inseparable")),
])  # fmt: skip
def test_a_text_is_cut_between_lines_or_words_near_its_middle(text, halves):
    assert split_in_the_middle(text) == halves


def mixed_recipe(documents: int) -> Recipe:
    return recipe(("  tokens: 300\n", f"  tokens: 300\n  mixed: {documents}\n"))


def test_joined_documents_are_held_out_text_that_fits_one_sequence(tmp_path):
    run, found = prepared_run(tmp_path), mixed_documents(prepared_run(tmp_path), mixed_recipe(20), tokenizer())
    assert len(found) == 20
    own = {1: " ".join(" ".join(texts(40, 1)).split()), 2: " ".join(" ".join(texts(40, 2)).split())}
    switched = 0
    for document in found:
        text = tokenizer().decode(document.tokens[1:])
        assert document.bytes == len(text.encode())
        assert document.tokens[0] == tokenizer().eos_token_id
        assert len(document.tokens) <= 24
        head, _, tail = text.partition(JOINT)
        head, tail = (" ".join(half.split()) for half in (head, tail))
        switched += any(head in own[a] and tail in own[b] for a, b in ((1, 2), (2, 1)))
    assert switched > 15, "a text may itself hold an empty line, but few do"
    again = mixed_documents(run, mixed_recipe(20), tokenizer())
    assert all((a.tokens == b.tokens).all() for a, b in zip(found, again, strict=True))


def test_a_trailing_end_of_text_token_is_not_scored(tmp_path):
    for domain in ("math", "general"):
        folder = tmp_path / "data" / domain / "0" / "val"
        write_token_file(folder, texts(9, 3), other_tokenizer(), rng_seed=0, source={})
    for document in mixed_documents(tmp_path, mixed_recipe(4), other_tokenizer()):
        assert document.tokens[0] == other_tokenizer().bos_token_id
        assert other_tokenizer().eos_token_id not in document.tokens


def test_a_domain_without_a_document_to_halve_is_named(tmp_path):
    run = prepared_run(tmp_path)
    write_token_file(run / "data/math/0/val", ["word"], tokenizer(), rng_seed=0, source={})
    with pytest.raises(DataError, match="'math' has no held-out document of two words"):
        mixed_documents(run, mixed_recipe(4), tokenizer())


@pytest.mark.parametrize(("mixed", "message"), [
    ("{documents: 3, kind: generated}", "generated documents need domains from the generators"),
    ("3", "halves needs at least two domains"),
    ("-3", "evaluate.mixed"),
])  # fmt: skip
def test_the_recipe_refuses_what_cannot_be_made(mixed, message):
    text = RECIPE.replace("    math: ./math.jsonl\n", "").replace(", {domain: math, weight: 0.25}", "")
    text = text.replace("domains: [math]", "domains: [general]")
    assert parse_recipe(text, "pico.yaml").evaluate.mixed.documents == 0
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text.replace("  tokens: 300\n", f"  tokens: 300\n  mixed: {mixed}\n"), "pico.yaml")


def test_the_mixed_set_stands_beside_the_domains_and_outside_their_mean(tmp_path):
    run, model = prepared_run(tmp_path), ModelEntry(llama(tmp_path / "m"), 0, 0.0, 0.0, "one")
    results = evaluate_models(run, mixed_recipe(6), {"seed": model}, log=lambda line: None)["models"]["seed"]
    assert results["mixed"].keys() == {"bits_per_byte", "stderr", "tokens", "bytes"}
    values = [found["bits_per_byte"] for found in results["domains"].values()]
    assert results["mean_bits_per_byte"] == pytest.approx(sum(values) / len(values))
    found = json.loads((run / "evaluate/documents.json").read_text("utf-8"))
    sizes, scores = found["bytes"], found["models"]["seed"]
    assert len(scores["mixed"]) == len(sizes["mixed"]) == 6
    assert sum(scores["mixed"]) / sum(sizes["mixed"]) == pytest.approx(results["mixed"]["bits_per_byte"], abs=1e-4)
    for domain, bits in scores["domains"].items():
        expected = results["domains"][domain]["bits_per_byte"]
        assert sum(bits) / sum(sizes["domains"][domain]) == pytest.approx(expected, abs=1e-4)
    assert sum(scores["tasks"]["knowledge"]) / 7 == results["tasks"]["knowledge"]["exact_match"]
    lines: list[str] = []
    evaluate_models(run, mixed_recipe(5), {"seed": model}, log=lines.append)
    assert "kept" not in lines[0], "another mixed set is measured anew"
