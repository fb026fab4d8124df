"""Every rule across a recipe's sections refuses what it is about, with its own words."""

from __future__ import annotations

from pathlib import Path

import pytest

from btx.errors import RecipeError
from btx.recipe import schema
from tests.pico_run import pico_recipe

BROKEN = {
    "_named_domains_exist": (["finetune.mixture={birds: 1, fish: 1}"],
                             "finetune.mixture names 'fish', which is not in data.domains: birds, general, tools"),
    "_branches_are_named_once": (["train.domains=[birds,birds]"], "train.domains names a domain twice"),
    "_own_tokens_are_a_branchs": (["train.domain_tokens={general: 512}"],
                                  "train.domain_tokens names 'general', which is not in train.domains"),
    "_no_domain_is_called_seed": (["data.domains.seed=birds.jsonl"], "a domain cannot be called 'seed'"),
    "_no_domain_is_called_tokenizer": (["data.domains.tokenizer=birds.jsonl"], "a domain cannot be called 'tokenizer'"),
    "_no_branch_is_called_generalist": (["data.domains.generalist=birds.jsonl", "train.domains=[birds,generalist]"],
                                        "a branch cannot be called 'generalist'"),
    "_there_are_two_experts": (["train.domains=[birds]", "mix.generalist=false", "mix.top_k=1"],
                               "a mixture needs at least two experts"),
    "_a_token_uses_no_more_experts_than_there_are": (["mix.top_k=4"], "mix.top_k is 4, but there are only 3 experts"),
    "_a_dense_router_gradient_is_top_ks": (["finetune.dense_router_gradient=true", "mix.router=soft"],
                                           "finetune.dense_router_gradient goes with mix.router: top_k, not soft"),
    "_biases_have_something_to_choose": (["finetune.load_balancing_bias=0.001", "mix.top_k=3"],
                                         "finetune.load_balancing_bias goes with mix.router: top_k and fewer experts"),
    "_a_dense_router_gradient_has_a_router_to_train": (
        ["finetune.dense_router_gradient=true", "finetune.trainable=shared"], "shared no router trains"),
    "_the_pooled_loss_is_of_a_micro_batch": (
        ["finetune.load_balancing_kind=pooled", "finetune.load_balancing_over=global_batch"],
        "the pooled loss is transformers', which sees one micro-batch"),
    "_experts_are_split_or_blended": (["mix.blend=true", "mix.split=2", "mix.router_init=random"],
                                      "mix.split and mix.blend exclude each other"),
    "_routers_from_text_need_experts_with_domains": (["mix.blend=true", "mix.router_init=ridge"],
                                                     "mix.router_init needs experts with domains"),
    "_halves_are_of_two_domains": (
        ["data.domains={birds: birds.jsonl}", "data.general=birds", "train.domains=[birds]",
         "evaluate.mixed.documents=2", "evaluate.mixed.kind=halves"],
        "evaluate.mixed: halves needs at least two domains"),
    "_generated_mixed_documents_have_their_generators": (
        ["evaluate.mixed.kind=generated", "evaluate.mixed.documents=2"],
        "there is none of code, general, knowledge, math; use kind: halves"),
    "_adapters_on_experts_are_trained_by_one_process": (
        ["align.sft.data=chat.jsonl", "align.sft.trainable=lora", "launch.processes=2"],
        "align.sft.trainable: lora is trained by one process"),
    "_the_merge_fits_its_members": (["mix.merge=weighted", "mix.merge_weights={fish: 1.0}"], "mix.merge: "),
    "_branches_are_equal_where_baselines_need_it": (
        ["train.domain_tokens={birds: 512}", "baselines=[dense_dm]"], "read the branches' sequences in turn"),
    "_baselines_take_their_settings": (["baseline_training.soup={tokens: 5}"], "soup is made without training"),
}  # fmt: skip


def test_every_rule_is_broken_here() -> None:
    assert [rule.__name__ for rule in schema.RULES] == list(BROKEN)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_rule_refuses_in_its_own_words_and_no_other_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    overrides, expected = BROKEN[rule]
    with pytest.raises(RecipeError) as refused:
        pico_recipe(tmp_path, "run", *overrides)
    assert expected in str(refused.value)
    monkeypatch.setattr(schema, "RULES", [known for known in schema.RULES if known.__name__ != rule])
    pico_recipe(tmp_path, "run", *overrides)
