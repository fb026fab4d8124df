"""What a routing says as a whole, and how sure it is: load of experts and pairs, what they tell of the domain, how
alike layers route, what a token's position and class change. docs/analyze.md says how each is read.

Intervals are of 95 %. Tokens of one document are not independent, so whole documents are drawn anew, domain by domain
(bootstrap; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3); of a domain with more than
GROUPS documents, groups of them. Where a domain has one document nothing says how it varies: its interval is all that
is possible, 0 to 1.

Shape letters: T tokens, G groups of documents, R resamples, L layers, E experts, K experts a token, P pairs, C cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from btx.data.held_out import Packed
from btx.evaluation.token_classes import CLASSES
from btx.moe.routers import Routing
from btx.reporting.shapes import Bounds, Interval, Statistics

GROUPS = 100
"""Groups of documents of a domain, at most."""
RESAMPLES = 1000
LEFT_OUT = 10
"""Groups of documents of which each is left out once (jackknife) where drawing anew would take too long."""
STUDENT = 2.262
"""0.975 quantile of Student's t with LEFT_OUT - 1 degrees of freedom."""
POSITIONS = (0, 16, 64, 256, 1024)
"""Where the cells of positions begin."""
DIGITS = 4


@dataclass(frozen=True)
class RoutedTokens:
    """Text tokens of a domain's documents with what every layer decided for them."""

    document_T: np.ndarray
    """Index of the document, from 0."""
    position_T: np.ndarray
    """Place in what the model reads at once, from 0."""
    token_T: np.ndarray
    """Token id."""
    ids_TLK: np.ndarray
    """Experts, largest gate first; -1 in layers that use fewer than others."""


def routed_tokens(routings_L: Sequence[Routing], rows: Packed) -> RoutedTokens:
    """The text tokens of some rows of one domain."""
    mask_T = rows.text_BS.flatten()
    K = max(routing.expert_ids_TK.shape[1] for routing in routings_L)
    ids_TLK = np.full((int(mask_T.sum()), len(routings_L), K), -1, np.int16)
    for layer, routing in enumerate(routings_L):
        ids_TK = routing.expert_ids_TK.cpu()[mask_T].numpy()
        ids_TLK[:, layer, : ids_TK.shape[1]] = ids_TK
    # The separator at the start of a piece has position 0.
    of_rows = (rows.document_ids_BS, rows.position_ids_BS - 1, rows.input_ids_BS)
    document_T, position_T, token_T = (values_BS.flatten()[mask_T].numpy() for values_BS in of_rows)
    return RoutedTokens(document_T, position_T, token_T, ids_TLK)


def together(parts: Sequence[RoutedTokens]) -> RoutedTokens:
    """Several forward passes of one model as one."""
    return RoutedTokens(*(
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("document_T", "position_T", "token_T", "ids_TLK")
    ))  # fmt: skip


def routing_statistics(
    domains: Mapping[str, RoutedTokens], experts: Sequence[str], class_V: np.ndarray,
    pairs: Mapping[str, Sequence[tuple[int, int]]],
) -> Statistics:  # fmt: skip
    """What the routing says as a whole.

    Args:
        domains: name → its tokens, one at least.
        class_V: index in CLASSES of every token of the vocabulary.
        pairs: domain → pairs of experts, the smaller index first, whose shares are told.
    """
    E, everything = len(experts), together(list(domains.values()))
    groups = [_groups(tokens.document_T, GROUPS) for tokens in domains.values()]
    draws = [_draws(group_T, [0, number]) for number, group_T in enumerate(groups)]
    load, pair_load, firsts = {}, {}, []
    for (name, tokens), group_T, draws_RG in zip(domains.items(), groups, draws, strict=True):
        G = draws_RG.shape[1]
        load[name] = _intervals(*_shares(_counts(group_T, tokens.ids_TLK, G, E), draws_RG))
        firsts.append(_counts(group_T, tokens.ids_TLK[:, :, :1], G, E))
        counts_GLP = _pair_counts(group_T, tokens.ids_TLK, G, E, pairs.get(name, ()))
        by_layer = _intervals(*_shares(counts_GLP, draws_RG))
        pair_load[name] = {
            f"{experts[a]}+{experts[b]}": [layer[place] for layer in by_layer]
            for place, (a, b) in enumerate(pairs.get(name, ()))
        }
    starts = np.cumsum([0, *(draws_RG.shape[1] for draws_RG in draws)])
    group_T = np.concatenate([group_T + start for group_T, start in zip(groups, starts, strict=False)])
    draws_RG = np.concatenate(draws, axis=1)
    position_T = np.digitize(everything.position_T, POSITIONS) - 1
    ends = [f"{begin}-{end - 1}" for begin, end in pairwise(POSITIONS)]
    positions = _cells([*ends, f"{POSITIONS[-1]}-"], position_T, group_T, everything.ids_TLK, E, draws_RG)
    by_class = _cells(CLASSES, class_V[everything.token_T], group_T, everything.ids_TLK, E, draws_RG)
    weight_T = np.concatenate([np.full(len(tokens.token_T), 1 / len(tokens.token_T)) for tokens in domains.values()])
    similarity = layer_similarity(everything.ids_TLK[:, :, 0], weight_T, group_T % LEFT_OUT, E)
    bounds: Bounds = {
        "similarity": _bounds(similarity),
        "positions": {name: _bounds(layers) for name, layers in positions.items()},
        "classes": {name: _bounds(layers) for name, layers in by_class.items()},
    }
    return {
        "load": load, "pairs": pair_load, "specialisation": specialisation(firsts, draws),
        "similarity": _values(similarity),
        "positions": {name: _values(layers) for name, layers in positions.items()},
        "classes": {name: _values(layers) for name, layers in by_class.items()}, "bounds": bounds,
    }  # fmt: skip


# --- counting -------------------------------------------------------------------------------------------------------


def _groups(document_T: np.ndarray, most: int) -> np.ndarray:
    """Group of each token's document, from 0, at most `most` of them."""
    _, numbers_T = np.unique(document_T, return_inverse=True)
    return numbers_T % most


def _draws(group_T: np.ndarray, seed: list[int]) -> np.ndarray:
    """How often each resample has each group (R, G)."""
    G = int(group_T.max(initial=0)) + 1
    return np.random.default_rng(seed).multinomial(G, [1 / G] * G, RESAMPLES).astype(np.float32)


def _counts(cell_T: np.ndarray, ids_TLK: np.ndarray, cells: int, num_experts: int) -> np.ndarray:
    """Routed tokens by cell, layer and expert: (C, L, E)."""
    T, L, K = ids_TLK.shape
    cells_TK = np.broadcast_to(cell_T[:, None], (T, K))
    counts_CLE = np.empty((cells, L, num_experts), np.float32)
    for layer in range(L):
        there_TK = ids_TLK[:, layer] >= 0
        code = (cells_TK * num_experts + ids_TLK[:, layer])[there_TK]
        counts_CLE[:, layer] = np.bincount(code, minlength=cells * num_experts).reshape(cells, num_experts)
    return counts_CLE


def _pair_counts(
    group_T: np.ndarray, ids_TLK: np.ndarray, groups: int, num_experts: int, pairs: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Tokens by group, layer and the two experts with the largest gates: (G, L, P + 1), all other pairs last."""
    place_of = np.full(num_experts * num_experts, len(pairs))
    for place, (a, b) in enumerate(pairs):
        place_of[a * num_experts + b] = place
    first_TL, second_TL = ids_TLK[:, :, 0].astype(np.int64), ids_TLK[:, :, min(1, ids_TLK.shape[2] - 1)].astype(int)
    second_TL = np.where(second_TL < 0, first_TL, second_TL)
    place_TL = place_of[np.minimum(first_TL, second_TL) * num_experts + np.maximum(first_TL, second_TL)]
    return _counts(group_T, place_TL[:, :, None], groups, len(pairs) + 1)


def _shares(counts_GLE: np.ndarray, draws_RG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares along the last axis, of all groups (L, E) and of every resample (R, L, E); as of all groups where a
    resample has nothing."""
    G, L, E = counts_GLE.shape
    total_LE = counts_GLE.sum(axis=0, dtype=np.float64)
    share_LE = total_LE / np.maximum(total_LE.sum(axis=1, keepdims=True), 1)
    if G == 1:
        return share_LE, np.stack([np.zeros_like(share_LE), np.ones_like(share_LE)])
    drawn_RLE = (draws_RG @ counts_GLE.reshape(G, L * E)).reshape(-1, L, E)
    sum_RL1 = drawn_RLE.sum(axis=2, keepdims=True)
    return share_LE, np.where(sum_RL1 > 0, drawn_RLE / np.maximum(sum_RL1, 1), share_LE)


def _cells(
    names: Sequence[str], cell_T: np.ndarray, group_T: np.ndarray, ids_TLK: np.ndarray, num_experts: int,
    draws_RG: np.ndarray,
) -> dict[str, list[list[Interval]]]:  # fmt: skip
    """Load in every cell that has tokens."""
    cells = {}
    for number, name in enumerate(names):
        if (there_T := cell_T == number).any():
            counts_GLE = _counts(group_T[there_T], ids_TLK[there_T], draws_RG.shape[1], num_experts)
            cells[name] = _intervals(*_shares(counts_GLE, draws_RG))
    return cells


# --- information ----------------------------------------------------------------------------------------------------


def entropy(shares: np.ndarray) -> np.ndarray:
    """-Σ p ln p along the last axis, in nats."""
    return -(shares * np.log(shares, where=shares > 0, out=np.zeros_like(shares))).sum(axis=-1)


def specialisation(counts_DGLE: Sequence[np.ndarray], draws_DRG: Sequence[np.ndarray]) -> list[Interval]:
    """Of every layer: I(domain; first expert) / H(domain), each domain counting the same; nothing for one domain.

    Mutual information of shares that are estimated is larger in resamples than in the sample; the bounds are shifted
    down by as much.

    Args:
        counts_DGLE: for each domain, tokens by group, layer and first expert (G, L, E).
        draws_DRG: for each domain, how often each resample has each group (R, G).
    """
    if len(counts_DGLE) < 2:
        return []
    shares = [_shares(counts_GLE, draws_RG) for counts_GLE, draws_RG in zip(counts_DGLE, draws_DRG, strict=True)]

    def information(share_DLE: Sequence[np.ndarray]) -> np.ndarray:
        mean = np.mean(share_DLE, axis=0)
        return (entropy(mean) - np.mean([entropy(share) for share in share_DLE], axis=0)) / math.log(len(share_DLE))

    value_L = information([share for share, _ in shares])
    if any(counts_GLE.shape[0] == 1 for counts_GLE in counts_DGLE):
        return _intervals(value_L, np.stack([np.zeros_like(value_L), np.ones_like(value_L)]))
    drawn_RL = information([drawn for _, drawn in shares])
    return _intervals(value_L, drawn_RL + (value_L - drawn_RL.mean(axis=0)))


def layer_similarity(
    first_TL: np.ndarray, weight_T: np.ndarray, left_out_T: np.ndarray, num_experts: int
) -> list[list[Interval]]:
    """Of every two layers: mutual information of their first experts over the mean of their entropies, (L, L); 1 where
    one layer's expert says the other's, 0 where it says nothing. Bounds by the jackknife.

    Args:
        weight_T: what each token counts.
        left_out_T: the group, of LEFT_OUT, with which each token is left out.
    """
    L, E = first_TL.shape[1], num_experts
    same: Interval = {"value": 1.0, "low": 1.0, "high": 1.0}
    table: list[list[Interval]] = [[same] * L for _ in range(L)]
    base_T, groups = left_out_T.astype(np.int64) * E, len(np.unique(left_out_T))
    for one, other in combinations(range(L), 2):
        code_T = (base_T + first_TL[:, one]) * E + first_TL[:, other]
        joint_GEE = np.bincount(code_T, weight_T, minlength=LEFT_OUT * E * E).reshape(LEFT_OUT, E, E)
        joint_EE = joint_GEE.sum(axis=0)
        value = float(_likeness(joint_EE[None])[0])
        low, high = 0.0, 1.0
        if groups == LEFT_OUT:
            without_G = _likeness(np.maximum(joint_EE - joint_GEE, 0))
            spread = math.sqrt((LEFT_OUT - 1) / LEFT_OUT * float(np.square(without_G - without_G.mean()).sum()))
            low, high = max(0.0, value - STUDENT * spread), min(1.0, value + STUDENT * spread)
        table[one][other] = table[other][one] = _interval(value, low, high)
    return table


def _likeness(joint_GEE: np.ndarray) -> np.ndarray:
    """Normalised mutual information of tables (G, E, E) that need not sum to 1: (G,)."""
    share_GEE = joint_GEE / joint_GEE.sum(axis=(1, 2), keepdims=True)
    one_G, other_G = entropy(share_GEE.sum(axis=2)), entropy(share_GEE.sum(axis=1))
    both_G, mean_G = entropy(share_GEE.reshape(len(share_GEE), -1)), (one_G + other_G) / 2
    return np.where(mean_G > 0, (one_G + other_G - both_G) / np.where(mean_G > 0, mean_G, 1), 0.0).clip(0, 1)


# --- writing --------------------------------------------------------------------------------------------------------


def _interval(value: float, low: float, high: float) -> Interval:
    return {"value": round(value, DIGITS), "low": round(low, DIGITS), "high": round(high, DIGITS)}


def _intervals(value: np.ndarray, drawn_R: np.ndarray) -> Any:
    """Values with their 2.5th and 97.5th percentile over resamples, which are inside 0 to 1, as nested lists."""
    low, high = np.percentile(drawn_R, (2.5, 97.5), axis=0, method="nearest").clip(0, 1)
    low, high = np.minimum(low, value), np.maximum(high, value)

    def nested(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[Any]:
        if value.ndim == 1:
            return [_interval(*numbers) for numbers in zip(value.tolist(), low.tolist(), high.tolist(), strict=True)]
        return [nested(*part) for part in zip(value, low, high, strict=True)]

    return nested(value, low, high)


def _bounds(layers: Sequence[Sequence[Interval]]) -> list[list[list[float]]]:
    return [[[interval["low"], interval["high"]] for interval in layer] for layer in layers]


def _values(layers: Sequence[Sequence[Interval]]) -> list[list[float]]:
    return [[interval["value"] for interval in layer] for layer in layers]
