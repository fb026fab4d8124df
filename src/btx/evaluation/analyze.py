"""Which experts tokens use: load of the experts and of their pairs by domain and layer, and documents token by token
(paper, section 4.4 and appendix).

Shape letters: B batch, S sequence, T text tokens, E experts, K top-k, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from btx.data.held_out import HeldOutDocument, held_out_documents, pack
from btx.errors import CheckpointError
from btx.evaluation.kept_experts import documents_for_curve, kept_curve
from btx.evaluation.lag import DOCUMENTS, changing_documents, lag
from btx.evaluation.mixed_set import texts_to_halve
from btx.evaluation.routed_text import example_documents, name_of, routing_of, token_by_token
from btx.evaluation.routing_statistics import RoutedTokens, routed_tokens, routing_statistics, together
from btx.evaluation.token_classes import CLASSES, texts_of_vocabulary, token_class
from btx.evaluation.used_for import used_for
from btx.files import write_json
from btx.models.device import measuring_place
from btx.models.loading import load_tokenizer
from btx.models.outputs import MICRO_BATCH_TOKENS
from btx.models.placement import load_placed
from btx.moe.any_moe import moe_layers, num_experts, only_experts
from btx.moe.routers import Routing
from btx.moe.routing_metrics import DEAD_LOAD
from btx.number_texts import spread
from btx.process import Log
from btx.reporting.shapes import Lag
from btx.reporting.tokens import own_experts

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
            probs_TE = logits_TE.softmax(dim=-1)
            self.entropy_L[layer] += torch.special.entr(probs_TE).sum()  # 0 for probability 0, of forbidden experts
            self.confidence_L[layer] += probs_TE.max(dim=-1).values.sum()

    def load(self) -> Tensor:
        """Share of each expert (L, E)."""
        return self.load_LE / self.load_LE.sum(dim=1, keepdim=True)

    def told_pairs(self) -> list[tuple[int, int]]:
        """Pairs of experts that are told: at most PAIRS, those with the most tokens; none where a token uses one."""
        if self.load_LE.sum() < 1.5 * self.tokens * len(self.load_LE):
            return []
        pairs = list(combinations(range(self.load_LE.shape[1]), 2))
        share_EE = self.pairs_LEE.sum(dim=0)
        return sorted(sorted(pairs, key=lambda pair: -float(share_EE[pair]))[:PAIRS])

    def summary(self, experts: Sequence[str]) -> dict[str, Any]:
        """A domain's entry in routing.json: shares of the load, of the two largest gates' pairs, means."""
        pairs = self.told_pairs()
        return {
            "tokens": self.tokens,
            "load": self.load().tolist(),
            "pairs": {f"{experts[a]}+{experts[b]}": (self.pairs_LEE[:, a, b] / self.tokens).tolist() for a, b in pairs},
            "entropy": (self.entropy_L / self.tokens).tolist(),
            "confidence": (self.confidence_L / self.tokens).tolist(),
        }


def domain_routing(
    model: PreTrainedModel, documents: Sequence[HeldOutDocument], sequence_length: int, *, apart: bool = False
) -> tuple[RoutingTotals, RoutedTokens]:
    """Routing of the text tokens of `documents`, as sums and one by one; separators and padding do not count."""
    totals, parts = RoutingTotals(len(moe_layers(model)), num_experts(model)), []
    for rows in pack(documents, sequence_length, apart=apart).batches(MICRO_BATCH_TOKENS):
        routings_L = routing_of(model, rows)
        totals.add(routings_L, rows.text_BS.flatten())
        parts.append(routed_tokens(routings_L, rows))
    return totals, together(parts)


@dataclass(frozen=True)
class DomainText:
    """What the routing of a domain is looked at on."""

    documents: list[HeldOutDocument]
    """Their tokens are counted."""
    curve: list[HeldOutDocument]
    """What models with fewer experts are measured on."""
    shown: list[HeldOutDocument]
    halves: list[str]


@dataclass(frozen=True)
class Analysis:
    """How a model is looked at."""

    experts: list[str]
    owners: dict[str, int]
    """Domain → index of the expert of its own, of those that have one."""
    sequence_length: int
    """Tokens that are read at once, at most."""
    dropped: list[int] | None = None
    """Experts that are forbidden; the curve drops these one by one. None: none is, the curve drops the least used."""
    apart: bool = False

    def of(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, domains: Mapping[str, DomainText]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """routing.json and tokens.json of a MoE model."""
        allowed_E = None
        if self.dropped is not None:
            allowed_E = torch.ones(len(self.experts), dtype=torch.bool)
            allowed_E[self.dropped] = False
        with only_experts(model, allowed_E):
            routing, tokens, order = self._routing(model, tokenizer, domains)
        if self.dropped is not None:
            routing["dropped"] = [self.experts[expert] for expert in self.dropped]
            routing["dead"] = [place for place in routing["dead"] if place[1] not in self.dropped]
            order = [*self.dropped, next(e for e in order if e not in self.dropped)]
        packed = {name: pack(text.curve, self.sequence_length, apart=self.apart) for name, text in domains.items()}
        routing["kept"] = kept_curve(model, packed, self.experts, order)
        return routing, tokens

    def _routing(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, domains: Mapping[str, DomainText]
    ) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
        """routing.json without the curve, tokens.json, and the experts by their load, least first."""
        totals, routed, examples = dict[str, RoutingTotals](), dict[str, RoutedTokens](), []
        for domain, text in domains.items():
            totals[domain], routed[domain] = domain_routing(
                model, text.documents, self.sequence_length, apart=self.apart
            )
            examples += [
                {"domain": domain, "document": name_of(document)} | token_by_token(model, tokenizer, document.tokens)
                for document in text.shown
            ]
        told = {domain: total.told_pairs() for domain, total in totals.items()}
        class_V = classes_of_tokens(tokenizer, cast(Any, model).get_input_embeddings().weight.shape[0], routed)
        layers = {"layers": len(moe_layers(model)), "experts": self.experts}
        routing: dict[str, Any] = layers | {
            "domains": {domain: total.summary(self.experts) for domain, total in totals.items()},
            "dead": dead_experts(list(totals.values())),
            "statistics": routing_statistics(routed, self.experts, class_V, told),
            "used_for": used_for(together(list(routed.values())), tokenizer, self.experts, class_V),
            **self._lag(model, tokenizer, domains),
        }
        return routing, layers | {"examples": examples}, least_used_first(list(totals.values()))

    def _lag(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, domains: Mapping[str, DomainText]
    ) -> dict[str, Lag]:
        """`lag`, where two domains at least have an expert of their own and text to halve."""
        by_expert = {expert: domains[name].halves for name, expert in self.owners.items() if domains[name].halves}
        return {"lag": lag(model, changing_documents(by_expert, tokenizer, DOCUMENTS))} if len(by_expert) > 1 else {}


def say(routing: Mapping[str, Any], general: str | None, log: Log) -> None:
    """The findings of routing.json in a few lines; `general` as for `in_domain_layers`."""
    for domain, layers in in_domain_layers(routing, general).items():
        log(f"{domain}: its expert has the largest load in {len(layers)} of {routing['layers']} layers")
    if routing["dead"]:
        dead = (f"{routing['experts'][expert]} in layer {layer}" for layer, expert in routing["dead"])
        log(f"dead experts: {', '.join(dead)}")


def analyze(
    run_folder: Path, recipe: Recipe, model_path: Path, *, log: Log, folder: Path | None = None
) -> dict[str, Any]:
    """Route held-out text of every domain; write routing.json and tokens.json.

    Args:
        recipe: the run's recipe; `analyze.tokens` a domain at most, `analyze.examples` documents shown of each.
        folder: results go here; default: `analyze` in the run folder.

    Returns:
        routing.json, as written. A domain's entropy is that of the router's probabilities in nats, its confidence the
        mean probability of the first expert.
    """
    folder = folder or run_folder / "analyze"
    model, tokenizer = load_placed(model_path, measuring_place(recipe, log)), load_tokenizer(model_path)
    experts, domains = recipe.expert_names, list(recipe.data.domains)
    if (there := num_experts(model)) != len(experts):
        has = f"{there} experts" if there else "no MoE layer"
        raise CheckpointError(f"{model_path}: this model has {has}; the recipe's are {', '.join(experts)}")
    analysis = Analysis(experts, own_experts(domains, experts, recipe.data.general), recipe.data.sequence_length)
    halves = texts_to_halve(run_folder, recipe, tokenizer, analysis.owners, HALVES)
    texts = {
        domain: DomainText(
            held_out_documents(run_folder, recipe, domain, recipe.analyze.tokens),
            documents_for_curve(run_folder, recipe, domain, tokenizer),
            spread(example_documents(run_folder, recipe, domain, recipe.analyze.examples), recipe.analyze.examples),
            halves.get(domain, []),
        )
        for domain in domains
    }
    routing, tokens = analysis.of(model, tokenizer, texts)
    write_json(folder / "routing.json", routing)
    write_json(folder / "tokens.json", tokens)
    say(routing, recipe.data.general, log)
    return routing


def classes_of_tokens(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, routed: Mapping[str, RoutedTokens]
) -> np.ndarray:
    """Index of the class of every token of the vocabulary (V,); 0 for those that do not occur."""
    there = np.unique(np.concatenate([tokens.token_T for tokens in routed.values()]))
    class_V = np.zeros(vocabulary, np.int64)
    class_V[there] = [CLASSES.index(token_class(text)) for text in texts_of_vocabulary(tokenizer, there.tolist())]
    return class_V


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
        general: name of the general domain, whose own expert is the generalist.
    """
    domains = routing["domains"]
    return {
        domain: [layer for layer, load_E in enumerate(domains[domain]["load"]) if load_E[expert] == max(load_E)]
        for domain, expert in own_experts(domains, routing["experts"], general).items()
    }
