"""The generated world: every fact has one answer, is stated in train, and its held-out renderings are not there."""

from functools import cache

import pytest

from btx.data.domains import documents, questions
from btx.data.domains.world import make_world
from btx.data.domains.world_text import NEVER_ASKED, is_never_asked, renderings
from btx.data.domains.world_wordings import QUESTIONS, STATEMENTS


@cache
def train_text(rng_seed: int = 0) -> str:
    return "\n\n".join(item.text for item in documents("knowledge", "train", rng_seed, 1_000_000, 0.05))


def test_every_fact_has_one_value():
    for rng_seed in range(5):
        facts = make_world(rng_seed)
        assert len({(fact.entity, fact.relation) for fact in facts}) == len(facts) == 358
        assert {fact.relation for fact in facts} == set(STATEMENTS) == set(QUESTIONS)


def test_answers_come_from_small_closed_sets():
    values: dict[str, set[str]] = {}
    for fact in make_world(0):
        values.setdefault(fact.relation, set()).add(fact.value)
    assert all(4 <= len(found) <= 36 for found in values.values()), values


def test_names_are_no_part_of_each_other():
    names = sorted({fact.entity for fact in make_world(0)})
    assert [(a, b) for a in names for b in names if a != b and a.lower() in b.lower()] == []


def test_wordings_name_entity_and_value_once_and_questions_not_the_value():
    for relation in STATEMENTS:
        assert len(set(STATEMENTS[relation])) == 5
        assert len(set(QUESTIONS[relation])) == 4
        assert all(wording.count("{x}") == wording.count("{y}") == 1 for wording in STATEMENTS[relation])
        assert all(wording.count("{x}") == 1 and "{y}" not in wording for wording in QUESTIONS[relation])


@pytest.mark.parametrize("rng_seed", [0, 1])
def test_every_fact_is_stated_in_train_and_its_held_out_renderings_are_not_there(rng_seed):
    text = train_text(rng_seed)
    for item in renderings("train", rng_seed):
        assert any(statement in text for statement in item.statements), item
    for item in renderings("val", rng_seed):
        (statement,), (question,) = item.statements, item.questions
        assert statement not in text
        assert statement.rstrip(".") not in text
        assert question.split("\nAnswer:")[0] not in text


def test_a_share_of_the_facts_is_never_asked_in_train():
    silent = [item.fact for item in renderings("train", 0) if is_never_asked(item.fact, 0)]
    assert len(silent) == pytest.approx(NEVER_ASKED * 358, rel=0.25)
    asked = {block.split("\nAnswer: ")[0] for block in train_text().split("Question: ")[1:]}
    for fact in silent:
        assert not asked & {wording.format(x=fact.entity) for wording in QUESTIONS[fact.relation]}
    others = [item.fact for item in renderings("train", 0) if not is_never_asked(item.fact, 0)]
    assert all(asked & {wording.format(x=fact.entity) for wording in QUESTIONS[fact.relation]} for fact in others)


def test_a_fact_is_met_dozens_of_times_in_300k_tokens():
    text = train_text()[:1_000_000]  # about 3.3 bytes a token
    counts = [sum(map(text.count, [*item.statements, *item.questions])) for item in renderings("train", 0)]
    assert min(counts) > 15
    assert 25 < sum(counts) / len(counts) < 80


def test_gold_answers_are_the_values_of_the_world():
    values = {fact.value for fact in make_world(0)}
    asked = questions("knowledge", 0, 358)
    assert {item.answer for item in asked} == values
    pairs = {question for item in renderings("val", 0) for question in item.questions}
    assert {item.full for item in asked} == pairs
