"""What a recipe may name stands in one list, in btx.choices: the recipe, the code behind it and `btx ls` follow it."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch

from btx.choices.baselines import BASELINES
from btx.choices.generators import GENERATORS
from btx.choices.launchers import LAUNCHERS
from btx.choices.merges import MERGE_METHODS, MergeSettings
from btx.choices.router_inits import ROUTER_INITS, RouterInit
from btx.choices.routers import ROUTERS, RoutingRule
from btx.choices.trainable import DENSE_TRAINABLE, MOE_TRAINABLE
from btx.cli.catalogue import CATALOGUE
from btx.data.domains import DOCUMENT_GENERATORS, QUESTION_GENERATORS
from btx.errors import CheckpointError, RecipeError
from btx.mixing.extend import ROW_FROM_TEXT
from btx.mixing.merge_methods import bind
from btx.mixing.router_init import FROM_TEXT, WITHOUT_TEXT
from btx.moe.routers import LayerRule
from btx.recipe.data import Source
from btx.recipe.evaluate import Task
from btx.recipe.loading import load_recipe
from btx.recipe.mix import Mix
from btx.recipe.schema import Launch, Recipe
from btx.recipe.section import Section
from btx.recipe.training import Finetune, Train
from btx.running.launchers import START
from tests.test_surface import in_a_new_process

WITH_QUESTIONS = [name for name, generator in GENERATORS.items() if generator.questions]


def names_of(kind: Any) -> list[str]:
    """The names that an annotation allows, in a list, as keys or with None."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if get_origin(kind) in (Union, UnionType, list):
        return names_of(get_args(kind)[0])
    assert get_origin(kind) is dict
    return names_of(get_args(kind)[0])


@pytest.mark.parametrize(("section", "field", "names"), [
    (Mix, "router", ROUTERS), (Mix, "merge", MERGE_METHODS), (Mix, "router_init", ROUTER_INITS),
    (Source, "generate", GENERATORS), (Task, "generate", WITH_QUESTIONS), (Launch, "kind", LAUNCHERS),
    (Recipe, "baselines", BASELINES), (Recipe, "baseline_training", BASELINES),
    (Train, "trainable", DENSE_TRAINABLE), (Finetune, "trainable", MOE_TRAINABLE),
])  # fmt: skip
def test_a_recipe_may_name_what_is_listed(section: type[Section], field: str, names: Any) -> None:
    assert names_of(section.model_fields[field].annotation) == list(names)


def test_a_name_that_is_listed_can_be_used_in_a_recipe_and_no_other() -> None:
    program = """
from btx.choices import merges, routers
routers.ROUTERS["new"] = routers.ROUTERS["soft"]
merges.MERGE_METHODS["new"] = merges.MERGE_METHODS["mean"]
from btx.recipe.loading import load_recipe
recipe = load_recipe("demo", ["mix.router=new", "mix.merge=new"])
print(recipe.routing.kind, recipe.merge_settings.method)
"""
    assert in_a_new_process(program) == "new new"
    with pytest.raises(RecipeError, match="expected one of top_k, switch, sample_top1, soft, got 'new'"):
        load_recipe("demo", ["mix.router=new"])


@pytest.mark.parametrize(("what", "names"), [
    ("routers", ROUTERS), ("merges", MERGE_METHODS), ("baselines", BASELINES), ("domains", GENERATORS),
    ("launchers", LAUNCHERS),
])  # fmt: skip
def test_btx_ls_shows_what_is_listed(what: str, names: Any) -> None:
    assert list(CATALOGUE[what]()) == list(names)
    assert all(CATALOGUE[what]().values())


def test_every_listed_name_has_what_it_names() -> None:
    from_text = {name for name, method in ROUTER_INITS.items() if method.needs_text}
    assert FROM_TEXT.keys() == ROW_FROM_TEXT.keys() == from_text
    assert WITHOUT_TEXT.keys() == ROUTER_INITS.keys() - from_text
    assert DOCUMENT_GENERATORS.keys() == GENERATORS.keys()
    assert sorted(QUESTION_GENERATORS) == sorted(WITH_QUESTIONS)
    assert START.keys() == LAUNCHERS.keys()
    assert {kind.router for kind in BASELINES.values()} - {None} <= ROUTERS.keys()


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_every_listed_merge_method_is_bound(method: str) -> None:
    weights = {"a": 1.0, "b": 2.0} if method == "weighted" else None
    assert bind(MergeSettings(method, weights=weights), ["a", "b"]).name == method


@pytest.mark.parametrize("method", ROUTER_INITS)
def test_parameters_of_a_router_start_are_fields_of_its_settings(method: str) -> None:
    told = RouterInit(method).as_json()
    assert list(told) == ["method", *ROUTER_INITS[method].parameters]
    assert None not in told.values()


@pytest.mark.parametrize("number", [float("inf"), float("nan"), -1.0, 0.0])
def test_numbers_that_no_merge_or_router_start_can_use_are_refused(number: float) -> None:
    settings = [MergeSettings("ties", scale=number), MergeSettings("dare", density=number)]
    settings.append(MergeSettings("weighted", weights={"a": number, "b": 1.0 if number else 0.0}))
    assert all(each.problems(["a", "b"]) for each in settings)
    starts = [RouterInit("random", std=number), RouterInit("ridge", ridge=number), RouterInit("ridge", scale=number)]
    assert all(start.problems() for start in starts)
    assert not any(RouterInit(method).problems() for method in ROUTER_INITS)


def test_a_router_that_is_not_listed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="router 'other': no such router; there are: top_k, switch, sample_top1"):
        RoutingRule("other")
    monkeypatch.setitem(ROUTERS, "other", ROUTERS["switch"])  # listed, but nobody wrote what it does
    with pytest.raises(KeyError, match="other"):
        LayerRule(RoutingRule("other"))(torch.zeros(3, 4), training=True, step=0)
