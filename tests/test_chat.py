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
from btx.cli import serve as cli_serve
from btx.data.token_files import DocumentEncoder
from btx.errors import CheckpointError, UserError
from btx.evaluation.tasks import complete
from btx.models.loading import load_model, load_tokenizer
from btx.moe.any_moe import only_experts, watched
from btx.moe.layer import moe_blocks
from btx.serving import completing, speaker
from btx.serving.sampling import ExpertChoice, Sampling
from tests.pico_models import llama, mixtral, tokenizer

PROMPT = "the sum of three €"


def said(model: Path, *, colours: bool = False, **options: object) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=colours, color_system="standard" if colours else None, width=10_000)
    drawn = {name: options.pop(name) for name in ("temperature", "rng_seed", "top_p") if name in options}
    chat.chat(model, console=console, sampling=Sampling(12, **drawn), **({"prompt": PROMPT} | options))
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
        with watched(model) as routings:
            model(input_ids=torch.tensor([ids]))
    pairs = [token.pair for token in tokens if token.pair]  # a cut-off last character comes without experts
    assert pairs == completing.top_pairs(completing.gates_of(routings, len(ids)))[1:]
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
    assert speaker.prompt_ids(templated, "x") == DocumentEncoder(templated)(["x"])[0]
    templated.chat_template = "{% for m in messages %}<|endoftext|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    assert tokenizer().decode(speaker.prompt_ids(templated, "x")) == "<|endoftext|>user: x"


@pytest.mark.parametrize("template", ["", "{% for m in messages %}<|endoftext|>{{ m['content'] }}{% endfor %}"])
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_every_character_of_an_answer_is_printed_from_its_first_token_on(template, temperature, tmp_path):
    folder = llama(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template) if template else None
    model, texts = load_model(folder), load_tokenizer(folder)
    for prompt, rng_seed in (("the sum", 1), ("€", 2), ("a\n", 3), ("", 4)):
        ids, new = speaker.prompt_ids(texts, prompt), []
        choose = completing.pick(temperature, torch.Generator().manual_seed(rng_seed))
        while len(new) < 12:
            with torch.no_grad():
                token = choose(model(input_ids=torch.tensor([ids + new])).logits[0, -1])
            if token == texts.eos_token_id:
                break
            new.append(token)
        printed = said(folder, prompt=prompt, temperature=temperature, rng_seed=rng_seed)
        assert printed == texts.decode(ids + new)[len(texts.decode(ids)) :] + "\n"
        found = speaker.completion(folder, prompt, Sampling(12, temperature, rng_seed=rng_seed))
        assert found["completion"] + "\n" == printed


def test_an_answer_is_printed_as_it_is(tmp_path, monkeypatch):
    folder, shown = llama(tmp_path / "model"), ["\t", "a[b]\r\n", " :smile: ", "\x0b"]
    tokens = [completing.ShownToken(text, (), from_prompt=False) for text in shown]
    monkeypatch.setattr(chat.Speaker, "answer", lambda *arguments: tokens)
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


def test_half_characters_are_refused_and_the_next_line_may_be_better(tmp_path, monkeypatch, capsys):
    folder = llama(tmp_path / "model")
    with pytest.raises(UserError, match=r"its character 3 is '\\udcff'"):
        cli_serve.chat(tmp_path / "nothing", prompt="hi\udcff")  # before a model is looked for
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hi\udcff\n{PROMPT}\n"))
    assert said(folder, prompt=None) == said(folder), "nothing but answers goes into a pipe"
    assert "error: the prompt is no valid text" in capsys.readouterr().err


def test_a_dense_model_has_no_experts_to_show(tmp_path):
    with pytest.raises(CheckpointError, match="dense"):
        said(llama(tmp_path / "model"), show_experts=True)


def test_a_negative_temperature_is_refused(tmp_path):
    with pytest.raises(UserError, match="temperature"):
        cli_serve.chat(tmp_path / "nothing", temperature=-1.0)


TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}assistant:"


def test_lines_are_one_conversation_where_there_is_a_template_until_it_is_begun_anew(tmp_path, monkeypatch):
    folder = llama(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setattr("sys.stdin", io.StringIO("the sum\nof three\n/new\nthe sum\n"))
    asked: list[list[int]] = []
    answer = speaker.Speaker.answer
    monkeypatch.setattr(
        speaker.Speaker, "answer", lambda self, ids, *more: asked.append(ids) or answer(self, ids, *more)
    )
    said(folder, prompt=None)
    first, second, third = (tokenizer().decode(ids) for ids in asked)
    assert first == third == "user: the sum<|endoftext|>assistant:"
    assert second.startswith("user: the sum<|endoftext|>assistant: ")
    assert second.endswith("<|endoftext|>user: of three<|endoftext|>assistant:")


def test_a_conversation_too_long_for_the_model_forgets_its_beginning(tmp_path, monkeypatch):
    folder = llama(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    lines = [f"the sum of {'three and ' * 20}{number}" for number in range(8)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert "error" not in said(folder, prompt=None)
    with pytest.raises(UserError, match="reads 256 at most; shorten it"):
        said(folder, prompt="three and " * 200)


def test_ctrl_c_ends_the_answer_and_not_the_program(tmp_path, monkeypatch):
    folder = llama(tmp_path / "model")

    def answer(self, *arguments):
        yield completing.ShownToken("half", (), from_prompt=False)
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        yield completing.ShownToken(" and whole", (), from_prompt=False)

    interrupted: list[bool] = []
    monkeypatch.setattr(speaker.Speaker, "answer", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n{PROMPT}\n"))
    assert said(folder, prompt=None) == "half\nhalf and whole\n"


def test_experts_can_be_used_alone_or_left_out(tmp_path):
    folder = mixtral(tmp_path / "model")
    model = speaker.Speaker(folder)
    ids = speaker.prompt_ids(model.tokenizer, PROMPT)

    def used(experts: ExpertChoice) -> set[int]:
        tokens = list(model.answer(ids, Sampling(6), experts))
        return {e for token in tokens for layer in token.gates_LE for e, gate in enumerate(layer) if gate > 0}

    assert used(ExpertChoice()) == {0, 1, 2, 3}
    assert used(ExpertChoice(only=("expert 2",))) == {2}
    assert used(ExpertChoice(without=("expert 2", "expert 0"))) == {1, 3}
    assert used(ExpertChoice()) == {0, 1, 2, 3}
    with pytest.raises(UserError, match="no expert 'law'; the model's are: expert 0, "):
        said(folder, experts=ExpertChoice(only=("law",)))
    with pytest.raises(UserError, match="no expert is left"):
        said(folder, experts=ExpertChoice(only=("expert 1",), without=("expert 1",)))
    with pytest.raises(UserError, match="dense model has no experts"):
        said(llama(tmp_path / "dense"), experts=ExpertChoice(without=("expert 1",)))


def test_where_one_expert_is_allowed_a_layer_is_that_expert(tmp_path):
    model = load_model(mixtral(tmp_path / "model"))
    block, x_BSD = moe_blocks(model)[0], torch.randn(2, 5, 32)
    gate_up, down = block.experts.gate_up_proj[3], block.experts.down_proj[3]
    gate, up = (x_BSD @ gate_up.T).chunk(2, dim=-1)
    with torch.no_grad(), only_experts(model, torch.tensor([False, False, False, True])):
        torch.testing.assert_close(block(x_BSD), (torch.nn.functional.silu(gate) * up) @ down.T)
    assert block.allowed_E is None


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6])
def test_next_to_no_temperature_draws_the_likeliest(temperature):
    draw = completing.pick(temperature, torch.Generator().manual_seed(0))
    assert draw(torch.tensor([-30.0, 12.5, -90.0, 12.0])) == 1


def test_top_p_draws_from_the_likeliest_alone():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    choose = completing.pick(1.0, torch.Generator().manual_seed(0), 0.7)
    assert {choose(logits) for _ in range(60)} == {0, 1}
    assert {completing.pick(1.0, torch.Generator().manual_seed(s), 0.1)(logits) for s in range(20)} == {0}


@pytest.mark.parametrize(("texts", "stops", "shown"), [
    (["ab", "c", "d"], ["cd"], "ab"), (["ab", "c", "e"], ["cd"], "abce"), (["abcd"], ["bc"], "a"),
    (["a", "b"], ["a"], ""), (["a\n", "\nb"], ["\n\n", "x"], "a"), (["a", "b"], [], "ab"),
])  # fmt: skip
def test_an_answer_ends_before_a_stop_string(texts, stops, shown):
    tokens, met = [completing.ShownToken(text, (), from_prompt=False) for text in texts], []

    def answer():
        met.append((yield from completing.until_stop(iter(tokens), stops)))

    assert "".join(token.text for token in answer()) == shown
    assert met == [shown != "".join(texts)]
