"""The settings of a mix: one object or keywords, the same from a recipe, and nothing said twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import btx
from btx.choices.merges import MergeSettings
from btx.choices.router_inits import RouterInit
from btx.choices.routers import RoutingRule
from btx.cli.main import app
from btx.errors import CheckpointError, UserError
from btx.files import read_json
from btx.mixing.extend import extend
from btx.mixing.settings import MixSettings, mix_settings, upcycling_settings
from btx.recipe.mix import Mix
from tests.pico_run import pico_recipe

MakeLlama = Callable[..., Path]
NAMES = [field.name for field in fields(MixSettings)]


def test_settings_and_keywords_give_the_same_mix(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed, experts = make_llama("seed"), {"a": make_llama("a", 1)}
    given: dict[str, Any] = {"top_k": 1, "merge": "seed", "router_init": "zeros", "split": 2, "rng_seed": 3}
    btx.mix(seed, experts, tmp_path / "one", MixSettings(**given))
    btx.mix(seed, experts, tmp_path / "two", **given)
    written = {file.name for file in (tmp_path / "one").iterdir()}
    assert written == {file.name for file in (tmp_path / "two").iterdir()}
    for name in written:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert read_json(tmp_path / "one" / "mix.json")["split"] == {"chunks": 2, "rescale": True}


def test_a_keyword_that_is_no_setting_is_a_type_error_that_lists_them(make_llama: MakeLlama, tmp_path: Path) -> None:
    seed = make_llama("seed")
    with pytest.raises(TypeError, match=rf"mix\(\) takes no topk; its settings are: {', '.join(NAMES)}"):
        btx.mix(seed, {"a": seed}, tmp_path / "moe", topk=1)
    with pytest.raises(TypeError, match="not both; given beside settings: top_k, blend"):
        btx.mix(seed, {"a": seed}, tmp_path / "moe", MixSettings(), top_k=1, blend=True)
    assert not (tmp_path / "moe").exists()


def test_settings_are_frozen_and_every_one_of_them_is_documented() -> None:
    with pytest.raises(FrozenInstanceError):
        MixSettings().split = 2  # type: ignore[misc]
    lines = inspect.getsource(MixSettings).splitlines()
    for name in NAMES:
        place = next(number for number, line in enumerate(lines) if line.startswith(f"    {name}: "))
        assert lines[place + 1].lstrip().startswith('"""'), name


@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_beside_a_routing_rule_is_refused(make_llama: MakeLlama, tmp_path: Path, top_k: int) -> None:
    seed, rule = make_llama("seed"), RoutingRule(top_k=2)
    with pytest.raises(CheckpointError, match=rf"top_k is {top_k}, and routing .*top_k 2\): give one of the two"):
        btx.mix(seed, {"a": seed}, tmp_path / "moe", top_k=top_k, routing=rule)
    assert not (tmp_path / "moe").exists()


def test_the_rule_is_top_2_unless_something_else_is_said() -> None:
    assert MixSettings().rule == RoutingRule("top_k", top_k=2)
    assert MixSettings(top_k=1).rule == RoutingRule("top_k", top_k=1)
    assert MixSettings(top_k=0).rule.top_k == 0  # which no mix has: refused where experts are counted
    assert MixSettings(routing=RoutingRule("soft")).rule == RoutingRule("soft")


def test_a_mix_has_one_random_number_seed(make_llama: MakeLlama, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rng_seed is 0, and 5 in merge"):
        MixSettings(merge=MergeSettings("dare", rng_seed=5))
    with pytest.raises(CheckpointError, match="rng_seed is 1, and 5 in router_init"):
        MixSettings(rng_seed=1, router_init=RouterInit(rng_seed=5))
    settings = MixSettings(rng_seed=5, merge=MergeSettings("dare", rng_seed=5), router_init="random")
    assert (settings.merging.rng_seed, settings.start.rng_seed) == (5, 5)
    seed = make_llama("seed")
    btx.mix(seed, {"a": seed}, tmp_path / "moe")
    with pytest.raises(CheckpointError, match="rng_seed is 2, and 5 in router_init"):
        extend(tmp_path / "moe", "b", seed, tmp_path / "more", router_init=RouterInit(rng_seed=5), rng_seed=2)
    record = extend(tmp_path / "moe", "b", seed, tmp_path / "more", rng_seed=2)
    assert record["history"][-1]["router_init"] == {"method": "random", "std": 0.02, "rng_seed": 2}


CHANGES: dict[str, tuple[str, ...]] = {
    "generalist": ("mix.generalist=false",),
    "router": ("mix.router=soft",),
    "top_k": ("mix.top_k=1",),
    "capacity_factor": ("mix.capacity_factor=2",),
    "temperature_floor": ("mix.temperature_floor=0.1",),
    "temperature_rate": ("mix.temperature_rate=0.1",),
    "soft_first_layer": ("mix.soft_first_layer=false",),
    "merge": ("mix.merge=seed",),
    "merge_weights": ("mix.merge=weighted", "mix.merge_weights={birds: 1, tools: 2, generalist: 3}"),
    "slerp_t": ("mix.generalist=false", "mix.merge=slerp", "mix.slerp_t=0.1"),
    "merge_density": ("mix.merge=ties", "mix.merge_density=0.3"),
    "merge_scale": ("mix.merge=ties", "mix.merge_scale=0.3"),
    "router_init": ("mix.router_init=zeros",),
    "router_std": ("mix.router_std=0.5",),
    "router_scale": ("mix.router_scale=3",),
    "router_ridge": ("mix.router_ridge=0.5",),
    "router_tokens": ("mix.router_tokens=100",),
    "split": ("mix.split=2",),
    "split_rescale": ("mix.split_rescale=false",),
    "blend": ("mix.router_init=random", "mix.blend=true"),
    "dtype": ("mix.dtype=bfloat16",),
    "tokenizer_from": ("mix.tokenizer_from=seed",),
    "max_shard_size": ("mix.max_shard_size=1MB",),
}
"""Key under `mix:` → overrides, the last of which changes it alone."""


@pytest.mark.parametrize("key", Mix.model_fields)
def test_every_key_of_a_recipes_mix_reaches_the_settings(tmp_path: Path, key: str) -> None:
    *before, change = CHANGES[key]
    if key == "merge_weights":  # weighted needs weights
        before.append("mix.merge_weights={birds: 1, tools: 1, generalist: 1}")
    assert change.startswith(f"mix.{key}=")
    one, other = (mix_settings(pico_recipe(tmp_path, "run", *given)) for given in (before, [*before, change]))
    assert one != other


def test_upcycling_copies_have_the_shape_of_the_mix_with_top_k_and_random_routers(tmp_path: Path) -> None:
    recipe = pico_recipe(tmp_path, "run", "mix.router=switch", "mix.merge=ties", "mix.split=2", "mix.router_std=0.5",
                         "mix.dtype=bfloat16", "rng_seed=4")  # fmt: skip
    assert upcycling_settings(recipe) == MixSettings(
        generalist=False, routing=RoutingRule("top_k", top_k=1), router_init=RouterInit("random", std=0.5), split=2,
        rng_seed=4, dtype="bfloat16",
    )  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), [
    (["some-run", "--top-k", "1", "--no-generalist"], "--generalist, --top-k: a run is mixed as its recipe says"),
    (["--seed-model", "s", "-o", "o", "--copies", "2", "--generalist"], "--copies and --generalist exclude each other"),
])  # fmt: skip
def test_the_command_refuses_options_it_would_pass_over(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["mix", *arguments])
    assert isinstance(done.exception, UserError)
    assert words in str(done.exception)
