"""What a recipe makes of its baselines: the settings of every training stage, before tokens are matched. Plain Python.

Tokens are matched in `btx.baselines.matching`, which needs the models' sizes. What decides them is in
`matching_inputs`, so that a stage's hash knows it before anything runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from btx.choices.baselines import BASELINES, MatchedBy, stage_names
from btx.choices.routers import RoutingRule
from btx.recipe.mixtures import domain_mixture, finetune_mixture
from btx.recipe.schema import Recipe
from btx.recipe.training import Finetune, LearningRateFactors, Training

ROUTING_FIELDS = (
    "load_balancing", "load_balancing_kind", "load_balancing_over_layers", "load_balancing_over", "load_balancing_bias",
    "router_z_loss", "learning_rate_factors", "dense_router_gradient",
)  # fmt: skip
"""Settings of the finetuning that a MoE baseline's first phase has too; `train` has none of them."""

FLOPS_VERSION = 3
"""Goes into what decides the tokens of compute-matched baselines; raised whenever FLOPs are counted otherwise."""


@dataclass(frozen=True)
class Phase:
    """One training stage of a baseline."""

    stage: str
    data: Literal["domains", "mixture"]
    """`domains`: the branches' sequences, read in turn; `mixture`: the finetuning's."""
    settings: Finetune
    """Tokens are those of the run's own stages on the same data; what the matching makes of them is trained."""

    def mixtures(self, recipe: Recipe) -> list[dict[str, float]]:
        """Domain → sampling weight; several are read in turn."""
        if self.data == "mixture":
            return [finetune_mixture(recipe)]
        return [domain_mixture(recipe, domain) for domain in recipe.train.domains]


def phases_of(recipe: Recipe, name: str) -> list[Phase]:
    """The training stages of a baseline in order; empty if it is not trained."""
    kind = BASELINES[name]
    if not kind.trains:
        return []
    named = recipe.baseline_training.get(name)
    changes = named.settings if named else {}
    stages = stage_names(name)
    last = Phase(stages[-1], "mixture", _last_phase(recipe, name).model_copy(update=changes))
    if not kind.two_phases:
        return [last]
    if named and named.domains_learning_rate is not None:
        changes = changes | {"learning_rate": named.domains_learning_rate}
    return [Phase(stages[0], "domains", _first_phase(recipe, name).model_copy(update=changes)), last]


def routing_of(recipe: Recipe, name: str) -> RoutingRule:
    """The router of a MoE baseline: the recipe's, but for those that are about another one."""
    kind = BASELINES[name].router
    return replace(recipe.routing, kind=kind) if kind else recipe.routing


def matched_by(recipe: Recipe, name: str) -> MatchedBy:
    """What decides a baseline's tokens; `recipe`: `baseline_training` names them."""
    named = recipe.baseline_training.get(name)
    return "recipe" if named and named.tokens is not None else BASELINES[name].matched_by


def matching_inputs(recipe: Recipe, name: str) -> dict[str, Any]:
    """Everything that decides a baseline's tokens, as a JSON value; the seed model's shape comes on top."""
    by = matched_by(recipe, name)
    if by == "recipe":
        return {"by": by, "tokens": recipe.baseline_training[name].tokens, "phases": _budgets(phases_of(recipe, name))}
    if by == "tokens":
        return {"by": by}
    return {
        "by": by,
        "phases": _budgets(phases_of(recipe, name)),
        "branches": [len(recipe.train.domains), recipe.train.tokens, recipe.train.batch_tokens, recipe.train.trainable,
                     *([recipe.train.lora.rank] if recipe.train.trainable == "lora" else [])],
        "finetuning": [recipe.finetune.tokens, recipe.finetune.batch_tokens, recipe.finetune.dense_router_gradient,
                       recipe.finetune.trainable],
        "routers": recipe.mix.router_tokens if recipe.router_init.needs_text else 0,
        "experts": [len(recipe.expert_names), recipe.mix.split],
        "router": recipe.routing.as_json(),
        "counting": FLOPS_VERSION,
    }  # fmt: skip


def same_as_the_run(recipe: Recipe) -> list[str]:
    """Baselines that differ in nothing from the run itself, for example btx_soft beside `mix.router: soft`."""
    return [
        name for name in recipe.baselines
        if BASELINES[name].start == "mix" and routing_of(recipe, name) == recipe.routing
        and phases_of(recipe, name)[0].settings == recipe.finetune and matched_by(recipe, name) == "tokens"
    ]  # fmt: skip


def _first_phase(recipe: Recipe, name: str) -> Finetune:
    """As long as all branches together, with their settings; all weights train, whatever a branch trains."""
    length, train = recipe.data.sequence_length, recipe.train
    tokens = len(train.domains) * train.trained_tokens(length)
    return Finetune(**(_training(train) | {"tokens": tokens} | _routing(recipe, name)))


def _last_phase(recipe: Recipe, name: str) -> Finetune:
    """The finetuning's settings, with what the baseline changes; from the seed model all weights train."""
    kind, finetune = BASELINES[name], recipe.finetune
    if kind.two_phases:
        data = {"mixture": finetune.mixture, "switching": finetune.switching}
        return Finetune(**(_training(finetune) | data | _routing(recipe, name)))
    only_top_k: dict[str, Any] = {} if routing_of(recipe, name).kind == "top_k" else {"dense_router_gradient": False}
    return finetune.model_copy(update={**kind.changes, **only_top_k})


def _training(section: Training) -> dict[str, Any]:
    return {name: getattr(section, name) for name in Training.model_fields}


def _routing(recipe: Recipe, name: str) -> dict[str, Any]:
    """The losses on routers of a MoE baseline; none for a dense one."""
    if not BASELINES[name].has_routers:
        return {"load_balancing": 0.0, "learning_rate_factors": LearningRateFactors()}
    return {field: getattr(recipe.finetune, field) for field in ROUTING_FIELDS}


def _budgets(phases: list[Phase]) -> list[list[int | bool]]:
    return [[phase.settings.tokens, phase.settings.batch_tokens, phase.settings.dense_router_gradient]
            for phase in phases]  # fmt: skip
