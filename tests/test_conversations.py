"""Files of conversations and preferences: what a line may be, which tokens are learnt, how rows are packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btx.data.chat_text import PLAIN_TEMPLATE, Encoded, encode, question_ids, with_template
from btx.data.conversations import Conversation, Preference, data_files, read_rows
from btx.data.mixture import NO_LABEL
from btx.data.packed_conversations import PackedConversations, PackedPairs, best_fit_decreasing, fitted
from btx.errors import DataError
from btx.recipe.align import Sft

TALK = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": "wren?"},
    {"role": "assistant", "content": "a finch é"}, {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "a kite"},
]  # fmt: skip
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETS = (  # as Qwen3's: what an earlier answer says first is left out
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and loop.last %}<think>{% endif %}"
    "{{ m['content'] }}<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def lines_of(folder: Path, *lines: Any) -> Path:
    path = folder / "lines.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(text + "\n" for text in texts), "utf-8")
    return path


def talk(*said: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


@pytest.mark.parametrize(("line", "told"), [
    ("{", "not JSON"),
    ("[1]", "a conversation is a JSON object, not list"),
    ({"text": "wren"}, "a line has \"messages\", or \"prompt\" and \"completion\"; keys there: 'text'"),
    ({"messages": []}, "'messages' is a list of messages"),
    ({"messages": "wren"}, "'messages' is a list of messages"),
    ({"messages": [{"role": "user"}]}, "message 1: a message is"),
    (talk(("user", "wren?")), "no message is the assistant's"),
    (talk(("user", "wren?"), ("human", "a")), "message 2: its role is 'human'; roles are system, user, assistant"),
    (talk(("user", None), ("assistant", "a")), "message 1: its content is null"),
    (talk(("user", "a"), ("assistant", " ")), "message 2: the assistant says nothing"),
    (r'{"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "a"}]}', "half of a pair"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}, "tool_calls: only role and content"),
    ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "both texts, or both lists"),
    ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    ({"prompt": [], "completion": [{"role": "user", "content": "b"}]}, "no message of the assistant's"),
])  # fmt: skip
def test_a_broken_conversation_is_refused_with_its_line(tmp_path: Path, line: Any, told: str) -> None:
    path = lines_of(tmp_path, talk(("user", "wren?"), ("assistant", "a")), "", line)
    with pytest.raises(DataError) as refused:
        list(read_rows([path], pairs=False))
    assert f"{path}:3: " in str(refused.value)
    assert told in str(refused.value)


@pytest.mark.parametrize(("line", "told"), [
    ({"prompt": "a", "chosen": "b"}, 'a line has "prompt", "chosen" and "rejected"'),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
    ({"prompt": "a", "chosen": "b", "rejected": []}, "both texts, or both lists"),
    ({"chosen": "b", "rejected": "c"}, "begin with nothing in common"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "'rejected' is empty"),
])  # fmt: skip
def test_a_broken_pair_is_refused_with_its_line(tmp_path: Path, line: Any, told: str) -> None:
    path = lines_of(tmp_path, line)
    with pytest.raises(DataError) as refused:
        list(read_rows([path], pairs=True))
    assert f"{path}:1: " in str(refused.value)
    assert told in str(refused.value)


def test_files_that_hold_nothing_or_are_not_there_are_refused(tmp_path: Path) -> None:
    path = lines_of(tmp_path)
    with pytest.raises(DataError, match="holds no conversation"):
        list(read_rows([path], pairs=False))
    for name, told in (("gone.jsonl", "no such file"), (".", "a folder"), ("a.txt", "one JSON object a line is read")):
        (tmp_path / "a.txt").touch()
        with pytest.raises(DataError, match=rf"align\.sft\.data: .*{told}"):
            data_files(Sft(data=[name]), str(tmp_path), "sft")


def test_a_pair_without_prompt_begins_with_it(tmp_path: Path) -> None:
    asked = {"role": "user", "content": "wren?"}
    better, worse = ({"role": "assistant", "content": content} for content in ("a", "b"))
    path = lines_of(
        tmp_path,
        {"chosen": "the wren sings", "rejected": "the wren cuts"},
        {"chosen": [asked, better], "rejected": [asked, worse]},
    )
    text, messages = read_rows([path], pairs=True)
    assert isinstance(text, Preference)
    assert (text.chosen.prompt, text.chosen.completion, text.rejected.completion) == ("the wren", " sings", " cuts")
    assert isinstance(messages, Preference)
    assert messages.chosen.messages == (asked, better)
    assert messages.rejected.learnt_from == 1


@pytest.fixture(scope="module")
def tokenizer(pico_tokenizer_folder: Path) -> Any:
    from btx.models.loading import load_tokenizer

    return load_tokenizer(pico_tokenizer_folder)


def learnt(tokenizer: Any, encoded: Encoded) -> list[str]:
    """The stretches of tokens that are learnt, as text."""
    stretches, before = list[list[int]](), False
    for token, is_answer in zip(encoded.ids_N.tolist(), encoded.is_answer_N.tolist(), strict=True):
        if is_answer:
            stretches = stretches if before else [*stretches, []]
            stretches[-1].append(token)
        before = is_answer
    return [tokenizer.decode(ids) for ids in stretches]


@pytest.mark.parametrize(("template", "end"), [
    (PLAIN_TEMPLATE, "<|endoftext|>"),
    (PLAIN_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""), "<|endoftext|>"),
    (CHATML, "<end>"),
])  # fmt: skip
def test_answers_and_the_ends_of_their_turns_are_learnt(tokenizer: Any, template: str, end: str) -> None:
    tokenizer.chat_template = template
    whole = encode(tokenizer, Conversation("f:1", tuple(TALK)), 0)
    assert learnt(tokenizer, whole) == [f"a finch é{end}", f"a kite{end}"]
    last = encode(tokenizer, Conversation("f:1", tuple(TALK), learnt_from=3), 0)
    assert learnt(tokenizer, last) == [f"a kite{end}"]
    assert whole.ids_N.tolist() == last.ids_N.tolist()
    first = encode(tokenizer, Conversation("f:1", tuple(TALK[1:3])), 0)
    asked = question_ids(tokenizer, "wren?")
    assert first.ids_N[: len(asked)].tolist() == asked, "a model is asked as it was trained"
    assert first.is_answer_N.tolist() == [False] * len(asked) + [True] * (len(first.ids_N) - len(asked))


def test_a_template_that_writes_a_beginning_otherwise_is_refused_where_it_does(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETS
    assert learnt(tokenizer, encode(tokenizer, Conversation("f:1", tuple(TALK[:3])), 0)) == ["<think>a finch é<end>"]
    with pytest.raises(DataError, match="f:1: message 3: the chat template writes"):
        encode(tokenizer, Conversation("f:1", tuple(TALK)), 0)
    tokenizer.chat_template = "{{ raise_exception('system is not supported') }}"
    with pytest.raises(DataError, match="f:1: the chat template does not take the conversation: system is not supp"):
        encode(tokenizer, Conversation("f:1", tuple(TALK)), 0)


def test_plain_text_is_a_document_whose_completion_is_learnt(tokenizer: Any) -> None:
    encoded = encode(tokenizer, Conversation("f:1", prompt="the wren", completion=" sings"), 7)
    assert encoded.ids_N[0] == 7
    assert learnt(tokenizer, encoded) == [" sings<|endoftext|>"]


def test_the_plain_template_is_for_tokenizers_without_one(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    assert not with_template(tokenizer)
    tokenizer.chat_template = None
    assert with_template(tokenizer)
    assert tokenizer.chat_template == PLAIN_TEMPLATE


def made(number: int, length: int, prompt: int = 2) -> Encoded:
    """A conversation whose tokens nobody else has."""
    return Encoded(f"f:{number}", 1000 * number + np.arange(length), np.arange(length) >= prompt)


def test_whole_conversations_fill_rows_and_nothing_is_learnt_twice() -> None:
    lengths = [5, 17, 9, 12, 4, 20, 3, 8]
    groups = [(made(number, length),) for number, length in enumerate(lengths)]
    packed = PackedConversations(groups, 20, rng_seed=1)
    assert sorted(number for row in packed.rows for number in row) == list(range(len(lengths)))
    batch = packed.of_rows(range(len(packed.rows)))
    for (each,) in groups:
        wanted = each.ids_N[each.is_answer_N]
        row, place = np.argwhere(batch.input_ids == each.ids_N[0])[0]
        span = slice(place, place + len(each.ids_N) - 1)
        assert (batch.input_ids[row, span] == each.ids_N[:-1]).all()
        assert (batch.position_ids[row, span] == np.arange(len(each.ids_N) - 1)).all()
        assert np.isin(batch.labels, wanted).sum() == len(wanted)
    assert batch.scored == sum(int(each.is_answer_N.sum()) for (each,) in groups)
    own = batch.labels != NO_LABEL
    assert (np.isin(batch.labels[own] - 1, batch.input_ids)).all(), "a label is the token after its input"


def test_sample_g_is_a_function_of_g_and_each_epoch_has_every_row() -> None:
    packed = PackedConversations([(made(number, 15),) for number in range(7)], 16, rng_seed=1)
    whole = packed.batch(0, 14)
    assert (packed.batch(5, 3).input_ids == whole.input_ids[5:8]).all()
    epochs = [whole.input_ids[:7, 0].tolist(), whole.input_ids[7:, 0].tolist()]
    assert [sorted(epoch) for epoch in epochs] == [[1000 * number for number in range(7)]] * 2
    assert epochs[0] != epochs[1]
    other = PackedConversations(packed.groups, 16, rng_seed=2).batch(0, 7)
    assert other.input_ids.tolist() != whole.input_ids[:7].tolist()


def test_both_answers_of_a_pair_are_in_one_row() -> None:
    groups = [(made(2 * number, 5 + number), made(2 * number + 1, 6)) for number in range(5)]
    batch = PackedPairs(groups, 24, rng_seed=0).batch(0, 3)
    assert batch.scored == 5
    for row in range(3):
        for answer in range(int(batch.answers[row].max()) + 1):
            learnt = batch.labels[row][batch.answers[row] == answer]
            assert len({label // 1000 for label in learnt.tolist()}) == 1
            assert learnt[0] // 1000 % 2 == answer % 2, "the better one comes first"
    assert ((batch.answers >= 0) == (batch.labels != NO_LABEL)).all()


def test_what_is_too_long_is_left_out_cut_or_refused() -> None:
    groups = [(made(0, 9),), (made(1, 30),), (made(2, 30, prompt=28),)]
    kept = fitted(groups, 20, "leave_out", where="align.sft")
    assert (len(kept.groups), kept.cut, kept.left_out) == (1, 0, 2)
    cut = fitted(groups, 20, "cut", where="align.sft")
    assert [len(each.ids_N) for (each,) in cut.groups] == [9, 21]
    assert cut.told("conversations") == "2 conversations; too long: 1 cut, 1 left out"
    with pytest.raises(DataError, match=r"f:1: 29 tokens do not fit into data.sequence_length, 20"):
        fitted(groups, 20, "refuse", where="align.sft")
    with pytest.raises(DataError, match="all 2 lines are longer"):
        fitted(groups[1:], 20, "leave_out", where="align.sft")


def test_rows_are_full_and_none_overflows() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 500).tolist()
    rows = best_fit_decreasing(lengths, 100)
    assert sorted(number for row in rows for number in row) == list(range(500))
    sums = [sum(lengths[number] for number in row) for row in rows]
    assert max(sums) <= 100
    assert sum(sums) / (100 * len(rows)) > 0.98
