"""How several processes share a step, and what is refused because they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from btx.choices.routers import RoutingRule
from btx.errors import RecipeError
from btx.planning.processes import check_processes
from btx.recipe.launch import Launch
from btx.recipe.training import Finetune
from btx.training.parallel import has_dropout, samples_of_process, why_not_shared
from btx.training.random_state import leave_out, numbers_drawn, seed_step
from tests.pico_run import pico_recipe

CPU = torch.device("cpu")


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8))
def test_every_sample_is_one_processs_and_all_have_as_many_micro_batches(
    count: int, micro: int, processes: int
) -> None:
    micro = min(micro, count)
    settings = Finetune(tokens=count, batch_tokens=count, micro_batch_tokens=micro)
    if why_not_shared(settings, 1, processes, router=None, has_dropout=False) is not None:
        return
    own = [samples_of_process(count, micro, processes, number) for number in range(processes)]
    assert [sample for part in own for sample in part] == list(range(count))
    assert len({-(-len(part) // micro) for part in own}) == 1
    if why_not_shared(settings, 1, processes, router=None, has_dropout=True) is None:
        assert all(part.start % micro == 0 for part in own), "whole micro-batches of one process's"


TOP_K, SWITCH = RoutingRule(), RoutingRule("switch")


@pytest.mark.parametrize(("changes", "router", "dropout", "problem"), [
    ({}, None, False, None),
    ({}, TOP_K, True, None),
    ({"batch_tokens": 60}, None, False, "batch_tokens 60: a step has 6 sequences of 10 tokens, which 4"),
    ({"micro_batch_tokens": 40}, None, False, None),
    ({"micro_batch_tokens": 40}, None, True, "micro_batch_tokens 40: a step has 8 sequences of 10 tokens in 2 micro"),
    ({"micro_batch_tokens": 40}, TOP_K, False, "and load_balancing goes by micro-batch; at most 20 fits"),
    ({"micro_batch_tokens": 40, "load_balancing": 0.0}, TOP_K, False, None),
    ({"micro_batch_tokens": 40, "load_balancing": 0.0}, SWITCH, False, "and the router switch goes by micro-batch"),
    ({"load_balancing_over": "global_batch"}, TOP_K, False, "load_balancing_over: global_batch looks at the step's"),
    ({"load_balancing_over": "global_batch", "micro_batch_tokens": 80}, TOP_K, False, None),
    ({"micro_batch_tokens": "auto"}, None, False, "micro_batch_tokens: auto is tried out by one process alone"),
    ({"optimizer": "adamw_8bit"}, None, False, "optimizer: adamw_8bit counts its moments in blocks of 256"),
])  # fmt: skip
def test_what_four_processes_cannot_share(
    changes: dict[str, object], router: RoutingRule | None, dropout: bool, problem: str | None
) -> None:
    settings = Finetune.model_validate({"tokens": 800, "batch_tokens": 80, "micro_batch_tokens": 20} | changes)
    found = why_not_shared(settings, 10, 4, router=router, has_dropout=dropout)
    assert (found is None) == (problem is None), found
    assert problem is None or problem in (found or "")
    assert why_not_shared(settings, 10, 1, router=router, has_dropout=dropout) is None


@pytest.mark.parametrize(("overrides", "problem"), [
    (["launch.processes=3"], "launch.processes: 3 for seed: seed_model.train.batch_tokens 256"),
    (["launch.processes={train: 4}"], "launch.processes: 4 for train/birds: train.micro_batch_tokens 128"),
    (["launch.processes={finetune: 2}", "finetune.load_balancing_over=global_batch"],
     "launch.processes: 2 for finetune: finetune.load_balancing_over: global_batch"),
    (["launch.processes={baselines: 3}", "baselines=[upcycling_dm]"],
     "launch.processes: 3 for baselines/upcycling_dm_domains: baseline_training.upcycling_dm or train.batch_tokens"),
    (["launch.processes=3", "launch.nodes=2"], "launch.nodes is 2 for seed, and its launch.processes, 3, cannot be"),
    (["launch.processes={mix: 2}"], ": launch.processes.mix: expected one of seed, train, finetune, align, baselines"),
    (["launch.nodes=many"], ": launch.nodes: expected a whole number, got 'many'"),
])  # fmt: skip
def test_a_recipe_that_asks_for_it_is_refused_with_its_keys(tmp_path: Path, overrides: list[str], problem: str) -> None:
    with pytest.raises(RecipeError) as refused:
        check_processes(pico_recipe(tmp_path, "run", *overrides))
    assert problem in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_recipe_whose_steps_can_be_shared_is_not(tmp_path: Path) -> None:
    check_processes(pico_recipe(tmp_path, "run", "launch.processes=2"))
    check_processes(pico_recipe(tmp_path, "run", "launch.processes=3"), left=["evaluate"])  # finished: nothing to share
    recipe = pico_recipe(tmp_path, "run", "launch.processes={finetune: 2}", "launch.kind=local")
    assert (recipe.launch.processes_of("finetune"), recipe.launch.processes_of("train/birds")) == (2, 1)
    everywhere = Launch.model_validate({"processes": 4, "nodes": 2})
    for stage in ("seed", "finetune", "baselines", "baselines/dense_dm"):
        assert (everywhere.processes_of(stage), everywhere.nodes_of(stage)) == (4, 2), stage
    for stage in ("mix", "baselines/soup", "baselines/upcycled", "evaluate"):
        assert (everywhere.processes_of(stage), everywhere.nodes_of(stage)) == (1, 1), stage


def test_dropout_is_seen_in_a_config() -> None:
    assert has_dropout({"attention_dropout": 0.1})
    assert has_dropout({"resid_pdrop": 0.1})
    assert not has_dropout({"attention_dropout": 0.0, "dropout_rate": None, "hidden_size": 8})


@pytest.mark.parametrize("count", [0, 1, 623, 624, 625, 1248, 5000])
def test_the_generator_tells_how_much_it_has_given_and_leaves_as_much_out(count: int) -> None:
    seed_step(3, 5, CPU)
    torch.empty(count, dtype=torch.int32).random_(0, 2)
    assert numbers_drawn(CPU) == (count, 0)
    torch.nn.functional.dropout(torch.ones(100))
    torch.empty(3, 50).exponential_()
    drawn = numbers_drawn(CPU)
    for _ in range(2):
        torch.empty(count, dtype=torch.int32).random_(0, 2)
        torch.nn.functional.dropout(torch.ones(100))
        torch.empty(3, 50).exponential_()
    expected = torch.rand(5)
    seed_step(3, 5, CPU)
    leave_out(3, drawn)
    assert torch.equal(torch.rand(5), expected)
