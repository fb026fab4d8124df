"""Which experts tokens use: load of the experts and of their pairs by domain and layer, and documents token by token
(paper, section 4.4 and appendix).

Shape letters: B batch, S sequence, T text tokens, E experts, K top-k, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from btx.data.held_out import HeldOutDocument, Packed, held_out_documents, pack
from btx.errors import CheckpointError
from btx.evaluation.kept_experts import documents_for_curve, kept_curve
from btx.evaluation.lag import changing_documents, lag
from btx.evaluation.mixed_set import texts_to_halve
from btx.evaluation.routed_text import example_documents, name_of, routing_of, token_by_token
from btx.evaluation.used_for import TokenTotals
from btx.files import write_json
from btx.models.device import measuring_place
from btx.models.loading import load_tokenizer
from btx.models.outputs import MICRO_BATCH_TOKENS
from btx.models.placement import load_placed
from btx.moe.layer import Routing, moe_blocks
from btx.moe.routing_metrics import DEAD_LOAD
from btx.reporting.shapes import Lag
from btx.reporting.tokens import own_expert

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from btx.recipe.schema import Recipe

HALVES = 24
"""Documents of a domain that are halved for the lag of the routing."""
PAIRS = 66
"""Pairs of experts kept of a domain: all of 12 experts, of more the most used; every pair would be the cube of the
experts in numbers."""


class RoutingTotals:
    """Sums over text tokens of one domain, a layer each: what the shares and means are made from."""

    def __init__(self, layers: int, num_experts: int) -> None:
        self.tokens = 0
        self.load_LE = torch.zeros(layers, num_experts, dtype=torch.float64)
        self.pairs_LEE = torch.zeros(layers, num_experts, num_experts, dtype=torch.float64)
        self.entropy_L = torch.zeros(layers, dtype=torch.float64)
        self.confidence_L = torch.zeros(layers, dtype=torch.float64)

    def add(self, routings_L: Sequence[Routing], mask_T: Tensor) -> None:
        """Count the tokens where `mask_T` is True."""
        E = self.load_LE.shape[1]
        self.tokens += int(mask_T.sum())
        for layer, routing in enumerate(routings_L):
            # Layers may be on several devices; the mask is on the host.
            ids_TK, logits_TE = routing.expert_ids_TK.cpu()[mask_T], routing.logits_TE.cpu()[mask_T].double()
            self.load_LE[layer] += ids_TK.flatten().bincount(minlength=E)
            first_T, second_T = ids_TK[:, :2].min(dim=1).values, ids_TK[:, :2].max(dim=1).values
            self.pairs_LEE[layer] += (first_T * E + second_T).bincount(minlength=E * E).view(E, E)
            log_probs_TE = logits_TE.log_softmax(dim=-1)
            self.entropy_L[layer] -= (log_probs_TE.exp() * log_probs_TE).sum()
            self.confidence_L[layer] += log_probs_TE.max(dim=-1).values.exp().sum()

    def load(self) -> Tensor:
        """Share of each expert (L, E)."""
        return self.load_LE / self.load_LE.sum(dim=1, keepdim=True)

    def summary(self, experts: Sequence[str]) -> dict[str, Any]:
        """A domain's entry in routing.json: shares of the load, of the two largest gates' pairs, means."""
        top_k = round(float(self.load_LE[0].sum()) / self.tokens)
        pairs = list(combinations(range(len(experts)), 2)) if top_k > 1 else []
        if len(pairs) > PAIRS:
            share_EE = self.pairs_LEE.sum(dim=0)
            pairs = sorted(sorted(pairs, key=lambda pair: -float(share_EE[pair]))[:PAIRS])
        return {
            "tokens": self.tokens,
            "load": self.load().tolist(),
            "pairs": {f"{experts[a]}+{experts[b]}": (self.pairs_LEE[:, a, b] / self.tokens).tolist() for a, b in pairs},
            "entropy": (self.entropy_L / self.tokens).tolist(),
            "confidence": (self.confidence_L / self.tokens).tolist(),
        }


def domain_routing(
    model: PreTrainedModel, documents: Sequence[HeldOutDocument], sequence_length: int,
    tokens: TokenTotals | None = None,
) -> RoutingTotals:  # fmt: skip
    """Routing of the text tokens of `documents`; separators and padding do not count. `tokens` counts them too."""
    blocks = moe_blocks(model)
    totals = RoutingTotals(len(blocks), blocks[0].gate.weight.shape[0])
    for rows in pack(documents, sequence_length).batches(MICRO_BATCH_TOKENS):
        routings_L, mask_T = routing_of(model, rows), rows.text_BS.flatten()
        totals.add(routings_L, mask_T)
        if tokens is not None:
            tokens.add(routings_L, rows.input_ids_BS.flatten(), mask_T)
    return totals


def analyze(
    run_folder: Path, recipe: Recipe, model_path: Path, *, log: Callable[[str], None], folder: Path | None = None
) -> dict[str, Any]:
    """Route held-out text of every domain; write routing.json and tokens.json.

    Args:
        run_folder: holds the prepared data.
        recipe: the run's recipe; `analyze.tokens` a domain at most, `analyze.examples` documents shown of each.
        model_path: folder of the MoE model.
        log: called with lines for the user.
        folder: results go here; default: `analyze` in the run folder.

    Returns:
        routing.json, as written. A domain's entropy is that of the router's probabilities in nats, its confidence the
        mean probability of the first expert.

    Raises:
        CheckpointError: a dense model, or one with another number of experts than the recipe.
        DataError: held-out data are missing.
    """
    folder, length = folder or run_folder / "analyze", recipe.data.sequence_length
    model, tokenizer = load_placed(model_path, measuring_place(recipe, log)), load_tokenizer(model_path)
    experts = recipe.expert_names
    blocks = moe_blocks(model)
    if not blocks or blocks[0].gate.weight.shape[0] != len(experts):
        found = f"{blocks[0].gate.weight.shape[0]} experts" if blocks else "no MoE layer"
        raise CheckpointError(f"{model_path}: this model has {found}; the recipe's are {', '.join(experts)}")
    totals: dict[str, RoutingTotals] = {}
    token_totals = TokenTotals(model.config.vocab_size, len(experts))
    packed: dict[str, Packed] = {}
    examples: list[dict[str, Any]] = []
    for domain in recipe.data.domains:
        documents = held_out_documents(run_folder, recipe, domain, recipe.analyze.tokens)
        totals[domain] = domain_routing(model, documents, length, token_totals)
        packed[domain] = pack(documents_for_curve(run_folder, recipe, domain, tokenizer), length)
        shown = example_documents(run_folder, recipe, domain, recipe.analyze.examples)
        examples += [
            {"domain": domain, "document": name_of(document)} | token_by_token(model, tokenizer, document.tokens)
            for document in spread(shown, recipe.analyze.examples)
        ]
    routing: dict[str, Any] = {
        "layers": len(blocks),
        "experts": experts,
        "domains": {domain: total.summary(experts) for domain, total in totals.items()},
        "dead": dead_experts(list(totals.values())),
        "used_for": token_totals.used_for(tokenizer, experts),
        **_lag(run_folder, recipe, model, tokenizer),
        "kept": kept_curve(model, packed, experts, least_used_first(list(totals.values()))),
    }
    write_json(folder / "routing.json", routing)
    write_json(folder / "tokens.json",
               {"layers": len(blocks), "experts": experts, "examples": examples})  # fmt: skip
    for domain, layers in in_domain_layers(routing, recipe.data.general).items():
        log(f"{domain}: its expert has the largest load in {len(layers)} of {len(blocks)} layers")
    if routing["dead"]:
        log(f"dead experts: {', '.join(f'{experts[e]} in layer {layer}' for layer, e in routing['dead'])}")
    return routing


def _lag(
    run_folder: Path, recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Lag]:  # fmt: skip
    """`lag`, of a run in which two domains at least have an expert of their own."""
    owners = {domain: own_expert(domain, recipe.expert_names, recipe.data.general) for domain in recipe.data.domains}
    with_own = [domain for domain, expert in owners.items() if expert is not None]
    texts = texts_to_halve(run_folder, recipe, tokenizer, with_own, HALVES)
    by_expert = {expert: texts[domain] for domain, expert in owners.items() if expert is not None and texts[domain]}
    return {"lag": lag(model, changing_documents(by_expert, tokenizer))} if len(by_expert) > 1 else {}


def least_used_first(totals: Sequence[RoutingTotals]) -> list[int]:
    """The experts by their load over all layers and domains, each domain counting the same."""
    return mean_load(totals).mean(dim=0).argsort(stable=True).tolist()


def mean_load(totals: Sequence[RoutingTotals]) -> Tensor:
    """Share of each expert (L, E) over all domains, each counting the same."""
    return torch.stack([total.load() for total in totals]).mean(dim=0)


def dead_experts(totals: Sequence[RoutingTotals]) -> list[list[int]]:
    """[layer, expert] where the load over all domains, each counting the same, is below DEAD_LOAD."""
    shares = mean_load(totals)
    return (shares < DEAD_LOAD).nonzero().tolist()


def in_domain_layers(routing: Mapping[str, Any], general: str | None = None) -> dict[str, list[int]]:
    """Layers in which a domain's own expert has the largest load, for the domains that have one.

    Args:
        routing: routing.json.
        general: name of the general domain, whose own expert is the generalist.
    """
    experts: list[str] = routing["experts"]
    layers = {}
    for domain, found in routing["domains"].items():
        if (own := own_expert(domain, experts, general)) is not None:
            layers[domain] = [layer for layer, load_E in enumerate(found["load"]) if load_E[own] == max(load_E)]
    return layers


def spread(documents: Sequence[HeldOutDocument], count: int) -> list[HeldOutDocument]:
    """At most `count` documents, evenly spread over `documents`."""
    count = min(count, len(documents))
    return [documents[i * len(documents) // count] for i in range(count)]
