"""Chat: completions as they come, the same as a plain greedy loop; colours and legend of the experts."""

from __future__ import annotations

import io
import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from rich.console import Console

from btx.cli import chat
from btx.data.token_files import DocumentEncoder
from btx.errors import CheckpointError, UserError
from btx.evaluation.tasks import complete
from btx.models.loading import load_model, load_tokenizer
from btx.serving import completing
from tests.pico_models import llama, mixtral, tokenizer

PROMPT = "the sum of three €"


def said(model: Path, *, colours: bool = False, **options: object) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=colours, color_system="standard" if colours else None, width=10_000)
    chat.chat(model, console=console, **({"prompt": PROMPT, "max_new_tokens": 12} | options))
    return output.getvalue()


@pytest.mark.parametrize("make", [llama, mixtral])
def test_a_completion_is_the_greedy_one(make, tmp_path):
    folder = make(tmp_path / "model")
    expected = complete(load_model(folder), tokenizer(), [PROMPT], "never written", 12)[0]
    assert said(folder) == expected + "\n"


def test_with_experts_prompt_and_completion_are_printed_after_a_legend(tmp_path):
    folder = mixtral(tmp_path / "model")
    (folder / "mix.json").write_text(json.dumps({"experts": ["math", "code", "wiki", "generalist"]}))
    legend, _, text = said(folder, show_experts=True).partition("\n\n")
    names = combinations(("math", "code", "wiki", "generalist"), 2)
    assert legend == "   ".join(f"{a} + {b}" for a, b in names)
    assert text == PROMPT + said(folder)


def test_every_token_is_coloured_by_the_two_experts_with_the_most_gate_weight(tmp_path):
    folder = mixtral(tmp_path / "model")
    model, ids = load_model(folder), DocumentEncoder(tokenizer())([PROMPT])[0]
    tokens = list(completing.complete_token_by_token(model, tokenizer(), ids, 6, completing.pick(0, torch.Generator())))
    assert "".join(token.text for token in tokens if token.from_prompt) == PROMPT
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        model(input_ids=torch.tensor([ids]))
    pairs = [token.pair for token in tokens if token.pair]  # a cut-off last character comes without experts
    assert pairs == completing.top_pairs(model, len(ids))[1:]
    assert len({token.pair for token in tokens}) > 2
    assert "\x1b[" in said(folder, colours=True, show_experts=True)
    assert "\x1b[" not in said(folder, colours=True)


def test_pairs_of_four_experts_have_six_different_colours_and_those_of_six_fifteen_styles():
    for experts, count in ((4, 6), (6, 15)):
        assert len({chat.pair_style(pair, experts) for pair in combinations(range(experts), 2)}) == count


def test_sampling_depends_on_the_rng_seed_alone(tmp_path):
    folder = llama(tmp_path / "model")
    first = said(folder, temperature=2.0, rng_seed=1)
    assert said(folder, temperature=2.0, rng_seed=1) == first
    assert said(folder, temperature=2.0, rng_seed=2) != first
    assert said(folder, temperature=1e-4) == said(folder)


def test_lines_are_completed_until_the_input_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n\n{PROMPT}\n"))
    folder = llama(tmp_path / "model")
    answer = said(folder)
    assert said(folder, prompt=None).count(answer.strip()) == 2


def test_a_chat_template_is_used_where_there_is_one():
    templated = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer, eos_token="<|endoftext|>")
    assert completing.prompt_ids(templated, "x") == DocumentEncoder(templated)(["x"])[0]
    templated.chat_template = "{% for m in messages %}<|endoftext|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    assert tokenizer().decode(completing.prompt_ids(templated, "x")) == "<|endoftext|>user: x"


@pytest.mark.parametrize("template", ["", "{% for m in messages %}<|endoftext|>{{ m['content'] }}{% endfor %}"])
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_every_character_of_an_answer_is_printed_from_its_first_token_on(template, temperature, tmp_path):
    folder = llama(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template) if template else None
    model, texts = load_model(folder), load_tokenizer(folder)
    for prompt, rng_seed in (("the sum", 1), ("€", 2), ("a\n", 3), ("", 4)):
        ids, new = completing.prompt_ids(texts, prompt), []
        choose = completing.pick(temperature, torch.Generator().manual_seed(rng_seed))
        while len(new) < 12:
            with torch.no_grad():
                token = choose(model(input_ids=torch.tensor([ids + new])).logits[0, -1])
            if token == texts.eos_token_id:
                break
            new.append(token)
        printed = said(folder, prompt=prompt, temperature=temperature, rng_seed=rng_seed)
        assert printed == texts.decode(ids + new)[len(texts.decode(ids)) :] + "\n"
        found = completing.completion(folder, prompt, max_new_tokens=12, temperature=temperature, rng_seed=rng_seed)
        assert found["completion"] + "\n" == printed


def test_an_answer_is_printed_as_it_is(tmp_path, monkeypatch):
    folder, shown = llama(tmp_path / "model"), ["\t", "a[b]\r\n", " :smile: ", "\x0b"]
    tokens = [completing.ShownToken(text, (), from_prompt=False) for text in shown]
    monkeypatch.setattr(chat, "complete_token_by_token", lambda *arguments: iter(tokens))
    assert said(folder) == "".join(shown) + "\n"
    assert not {"\r", "\x0b"} & set(said(folder, colours=True)), "nothing that steers a terminal"


def test_of_a_prompt_only_a_separator_is_left_out(tmp_path):
    folder = llama(tmp_path / "model")
    model, choose = load_model(folder), completing.pick(0, torch.Generator())
    for prompt in ("User: hi", "<|endoftext|>User: hi"):
        ids = tokenizer().encode(prompt, add_special_tokens=False)
        tokens = completing.complete_token_by_token(model, tokenizer(), ids, 3, choose)
        assert "".join(token.text for token in tokens if token.from_prompt) == "User: hi"


@pytest.mark.parametrize(("template", "message"), [
    ("{{ raise_exception('a system message has to come first') }}", r"to come first \(TemplateError\)"),
    ("{% for m in messages %}{{ m['content'] ", r"unexpected end of template.* \(TemplateSyntaxError\)\."),
    ("{{ messages[0].parts[3].text }}", r"has no attribute 'parts' \(UndefinedError"),
    ("{{ 1 // 0 }}", "ZeroDivisionError"), ("{# nothing #}", "makes nothing of the message"),
])  # fmt: skip
def test_a_chat_template_that_does_not_work_is_one_message_in_its_own_words(template, message, tmp_path):
    folder = llama(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=f"{folder}: its chat template .*{message}"):
        said(folder, prompt="hi")


def test_half_characters_are_refused_and_the_next_line_may_be_better(tmp_path, monkeypatch):
    folder = llama(tmp_path / "model")
    with pytest.raises(UserError, match=r"its character 3 is '\\udcff'"):
        said(tmp_path / "nothing", prompt="hi\udcff")  # before a model is looked for
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hi\udcff\n{PROMPT}\n"))
    printed = said(folder, prompt=None)
    assert "error: the prompt is no valid text" in printed
    assert said(folder).strip() in printed


def test_a_dense_model_has_no_experts_to_show(tmp_path):
    with pytest.raises(CheckpointError, match="dense"):
        said(llama(tmp_path / "model"), show_experts=True)


def test_a_negative_temperature_is_refused(tmp_path):
    with pytest.raises(UserError, match="temperature"):
        said(tmp_path, temperature=-1.0)
