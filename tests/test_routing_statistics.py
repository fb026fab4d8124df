"""What a routing says as a whole: against formulas written out, and intervals against what is known of the draws."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from btx.data.held_out import HeldOutDocument, pack
from btx.evaluation.routing_statistics import RoutedTokens, routed_tokens, routing_statistics, together
from btx.evaluation.token_classes import CLASSES
from btx.moe.routers import Routing

CLASS_OF = np.arange(20) % len(CLASSES)


def tokens_of(ids_TLK: np.ndarray, documents: int = 10, positions: np.ndarray | None = None) -> RoutedTokens:
    """Tokens dealt to `documents` documents of equal length; token ids 0, 1, 2, ..."""
    T = len(ids_TLK)
    places = np.arange(T) % (T // documents) if positions is None else positions
    return RoutedTokens(np.arange(T) * documents // T, places, np.arange(T) % 20, ids_TLK.astype(np.int16))


def statistics(domains: dict[str, RoutedTokens], experts: int, pairs: Any = ((0, 1),)) -> Any:
    names = [f"e{i}" for i in range(experts)]
    return routing_statistics(domains, names, CLASS_OF, dict.fromkeys(domains, pairs))


def entropy(values: list[Any]) -> float:
    counts = Counter(values)
    return -sum(n / len(values) * math.log(n / len(values)) for n in counts.values())


def test_values_are_those_of_the_formulas() -> None:
    random = np.random.default_rng(0)
    chosen = [np.argsort(random.random((300, 2, 4)) + skew, axis=2)[:, :, :2] for skew in (0.0, [0.5, 0, 0, 0.2])]
    found = statistics({"a": tokens_of(chosen[0]), "b": tokens_of(chosen[1])}, 4)
    for name, ids in zip("ab", chosen, strict=True):
        for layer in range(2):
            load = [float((ids[:, layer] == e).mean()) for e in range(4)]
            assert [interval["value"] for interval in found["load"][name][layer]] == pytest.approx(load, abs=1e-4)
            together_T = [set(pair) == {0, 1} for pair in ids[:, layer].tolist()]
            assert found["pairs"][name]["e0+e1"][layer]["value"] == pytest.approx(np.mean(together_T), abs=1e-4)
    first = [np.concatenate([ids[:, layer, 0] for ids in chosen]).tolist() for layer in range(2)]
    domain = [0] * 300 + [1] * 300
    for layer in range(2):
        shared = entropy(domain) + entropy(first[layer]) - entropy(list(zip(domain, first[layer], strict=True)))
        assert found["specialisation"][layer]["value"] == pytest.approx(shared / math.log(2), abs=1e-4)
    both = entropy(first[0]) + entropy(first[1]) - entropy(list(zip(*first, strict=True)))
    assert found["similarity"][0][1] == pytest.approx(2 * both / (entropy(first[0]) + entropy(first[1])), abs=1e-4)
    assert found["similarity"][0] == found["similarity"][1][::-1]
    assert found["similarity"][0][0] == 1
    assert found["positions"].keys() == {"0-15", "16-63"}
    everything = np.concatenate(chosen)
    early = np.concatenate([np.arange(300) % 30 < 16] * 2)
    share = [float((everything[early, 1] == e).mean()) for e in range(4)]
    assert found["positions"]["0-15"][1] == pytest.approx(share, abs=1e-4)
    numbers = np.concatenate([CLASS_OF[np.arange(300) % 20] == CLASSES.index("number")] * 2)
    share = [float((everything[numbers, 0] == e).mean()) for e in range(4)]
    assert found["classes"]["number"][0] == pytest.approx(share, abs=1e-4)


def test_experts_of_one_domain_each_say_all_of_it_and_the_same_ones_say_nothing() -> None:
    own = {name: tokens_of(np.full((100, 2, 1), e)) for e, name in enumerate("abc")}
    found = statistics(own, 3, ())
    assert found["specialisation"] == [{"value": 1.0, "low": 1.0, "high": 1.0}] * 2
    assert found["similarity"] == [[1.0, 1.0], [1.0, 1.0]]
    same = {name: tokens_of(np.arange(200).reshape(-1, 1, 1) % 2) for name in "ab"}
    assert statistics(same, 2, ())["specialisation"] == [{"value": 0.0, "low": 0.0, "high": 0.0}]
    assert statistics({"a": own["a"]}, 3, ())["specialisation"] == []


def test_an_interval_is_as_wide_as_documents_differ_not_tokens() -> None:
    random = np.random.default_rng(1)
    by_document = np.repeat(random.permutation(80) % 2, 50).reshape(-1, 1, 1)  # all tokens of a document go one way
    by_token = (np.arange(4000) % 2).reshape(-1, 1, 1)
    for ids, spread in ((by_document, math.sqrt(0.25 / 80)), (by_token, 0.0)):
        interval = statistics({"a": tokens_of(ids, 80)}, 2, ())["load"]["a"][0][0]
        assert interval["value"] == 0.5
        assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * spread, rel=0.15, abs=1e-3)
    positions = statistics({"a": tokens_of(by_document, 80)}, 2, ())
    low, high = positions["bounds"]["positions"]["0-15"][0][0]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 80), rel=0.15)


def test_the_interval_of_the_specialisation_is_around_it_though_resamples_say_more() -> None:
    random = np.random.default_rng(2)
    domains = {name: tokens_of(random.integers(0, 8, (200, 1, 1)), 20) for name in "ab"}
    (found,) = statistics(domains, 8, ())["specialisation"]
    assert 0 <= found["low"] < found["value"] < found["high"] < 0.1


def test_of_one_document_nothing_is_known() -> None:
    domains = {name: tokens_of(np.arange(40).reshape(-1, 1, 1) % 2, 1) for name in "ab"}
    found = statistics(domains, 2)
    assert found["load"]["a"][0][0] == {"value": 0.5, "low": 0.0, "high": 1.0}
    assert found["specialisation"] == [{"value": 0.0, "low": 0.0, "high": 1.0}]
    assert found["bounds"]["similarity"] == [[[1.0, 1.0]]]


def test_layers_may_use_different_numbers_of_experts_and_separators_do_not_count() -> None:
    documents = [HeldOutDocument(np.array([0, 5, 6, 7]), 3), HeldOutDocument(np.array([0, 8]), 1)]
    rows = pack(documents, 8)
    T = rows.input_ids_BS.numel()
    one = Routing(torch.zeros(T, 3), torch.ones(T, 1), torch.arange(T)[:, None] % 3)
    two = Routing(torch.zeros(T, 3), torch.ones(T, 2) / 2, torch.stack([torch.arange(T) % 3, torch.full((T,), 2)], 1))
    found = routed_tokens([one, two], rows)
    assert found.token_T.tolist() == [5, 6, 7, 8]
    assert found.document_T.tolist() == [0, 0, 0, 1]
    assert found.position_T.tolist() == [0, 1, 2, 0]
    assert found.ids_TLK[:, 0].tolist() == [[1, -1], [2, -1], [0, -1], [2, -1]]
    load = statistics({"a": together([found, found])}, 3)["load"]["a"]
    assert [interval["value"] for interval in load[0]] == [0.25, 0.25, 0.5]
    assert [interval["value"] for interval in load[1]] == [0.125, 0.125, 0.75]
