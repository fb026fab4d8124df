"""An Ollama Modelfile for a GGUF file: the chat template in Go's template language, found by trying the model's own.

https://github.com/ollama/ollama/blob/main/docs/modelfile.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from btx.errors import CheckpointError
from btx.model_files.beside_weights import CHAT_TEMPLATE
from btx.model_files.token_ids import read_object
from btx.system_errors import blame, first_line

Messages = Sequence[Mapping[str, str]]
Render = Callable[[Messages, bool], str]
PLAIN = "{{ .Prompt }}"
OLLAMAS_CONTEXT = 4096
"""Tokens that Ollama gives a model if the Modelfile does not say."""
MARKS = {"system": "SYS7Q", "user": "USR7Q", "assistant": "ANS7Q"}


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template writes around each message; all it does, if it is of this simple kind."""

    start: str
    """Before everything, if no system message is there: a default one."""
    roles: Mapping[str, tuple[str, str]]
    """Role → what stands before and after its text."""
    answer: str
    """What an answer begins with."""

    def go_template(self) -> str:
        """The same in Go's template language."""
        start = f"{{{{ if not .System }}}}{_go(self.start)}{{{{ end }}}}" if self.start else ""
        cases = [f'if eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}{_go(after)}'
                 for role, (before, after) in self.roles.items()]  # fmt: skip
        return start + "{{ range .Messages }}{{ " + "{{ else ".join(cases) + "{{ end }}{{ end }}" + _go(self.answer)

    def stops(self) -> list[str]:
        """Texts at which an answer is over: its end, or the next question."""
        texts = [self.roles["assistant"][1].strip(), self.roles["user"][0].strip()]
        return list(dict.fromkeys(text for text in texts if text))


def modelfile(folder: Path, gguf: str, licence: str | None = None) -> tuple[str, str | None]:
    """The Modelfile of a model folder.

    Args:
        folder: model folder, for its chat template and config.

    Returns:
        The text, and what the user should know of it, if anything.
    """
    config = read_object(folder / "config.json")
    special = _special_tokens(folder)
    render, note, chat = chat_template(folder, special), None, None
    if render is None:
        note = "the model has no chat template: Ollama completes texts with it (btx align makes an assistant of it)"
    elif (chat := chat_format(render, special.get("bos_token", "") if _adds_bos(folder) else "")) is None:
        note = (
            "the chat template does more than put texts around messages, which Ollama's language has no words for: the "
            "Modelfile has none, and Ollama completes texts; write TEMPLATE by hand for conversations"
        )
    lines = [f"FROM ./{gguf}", f"TEMPLATE {_quoted(chat.go_template() if chat else PLAIN)}"]
    stops = [*(chat.stops() if chat else ()), *filter(None, [special.get("eos_token")])]
    lines += [f"PARAMETER stop {_quoted(text)}" for text in dict.fromkeys(stops)]
    if (longest := int(config.get("max_position_embeddings") or OLLAMAS_CONTEXT)) < OLLAMAS_CONTEXT:
        lines.append(f"PARAMETER num_ctx {longest}")
    if licence is not None and '"""' not in licence:
        lines.append(f"LICENSE {_quoted(licence)}")
    return "\n".join(lines) + "\n", note


def chat_template(folder: Path, special: Mapping[str, str]) -> Render | None:
    """A folder's chat template as a function of messages and whether an answer shall follow; None without one.

    It runs in jinja2's sandbox, as transformers runs it.
    """
    text = _template_text(folder)
    if text is None:
        return None

    def refuse(message: str) -> str:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: ""}
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False)
    try:  # `generation` is transformers' own: it marks answers and writes nothing
        template = environment.from_string(re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", text))
    except Exception as error:  # the sandbox is for what a template does, not for what it is
        blame(error)
        raise CheckpointError(f"{folder}: its chat template is none: {first_line(error)}") from None

    def render(messages: Messages, answer_follows: bool) -> str:
        return template.render(messages=list(messages), add_generation_prompt=answer_follows, **special)

    return render


def chat_format(render: Render, bos: str = "") -> ChatFormat | None:
    """What a template puts around messages; None if it does anything else.

    Args:
        bos: begins every conversation; Ollama adds it by itself.
    """
    system, user, answer = ({"role": role, "content": mark} for role, mark in MARKS.items())

    def text(*messages: Mapping[str, str], follows: bool = False) -> str:
        return render(messages, follows).removeprefix(bos)

    try:
        one, two, three = text(user), text(user, answer), text(user, answer, user)
        if not (two.startswith(one) and three.startswith(two)):
            return None
        parts = {"user": three[len(two) :], "assistant": two[len(one) :]}
        start = one.removesuffix(parts["user"])
        with_system = _or_none(lambda: text(system, user))
        if with_system is not None and with_system.endswith(parts["user"]) and MARKS["system"] in with_system:
            parts = {"system": with_system.removesuffix(parts["user"])} | parts
        roles = {role: _around(part, MARKS[role]) for role, part in parts.items()}
        form = ChatFormat(start, roles, text(user, follows=True).removeprefix(one))
        talk = [*([system] if "system" in parts else []), user, answer, user, answer, user]
        whole = render(talk, True).removeprefix(bos)
    except Exception as error:  # a template may raise anything
        blame(error)
        return None
    composed = "".join(
        "".join((form.roles[each["role"]][0], each["content"], form.roles[each["role"]][1])) for each in talk
    )
    start = "" if "system" in parts else form.start
    return form if start + composed + form.answer == whole else None


def _or_none(render: Callable[[], str]) -> str | None:
    """A text, or None where the template refuses: many know no system messages."""
    try:
        return render()
    except TemplateError:
        return None


def _around(part: str, mark: str) -> tuple[str, str]:
    before, _, after = part.partition(mark)
    if not _ or mark in after:
        raise ValueError(f"{mark} does not stand there once")
    return before, after


def _go(text: str) -> str:
    """Text that Go's template language takes as it is."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    """A text in a Modelfile, over several lines if need be."""
    if '"""' in text:
        raise CheckpointError('the chat template holds """, which no Modelfile can; write the Modelfile by hand')
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'


def _template_text(folder: Path) -> str | None:
    if (file := folder / CHAT_TEMPLATE).is_file():
        try:
            return file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from error
    template = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = [each for each in template if isinstance(each, dict)]
        template = next((each.get("template") for each in named if each.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _adds_bos(folder: Path) -> bool:
    """Whether llama.cpp begins every text with the token of a beginning by itself."""
    if isinstance(adds := _json(folder / "tokenizer_config.json").get("add_bos_token"), bool):
        return adds
    processor = _json(folder / "tokenizer.json").get("post_processor") or {}
    steps = processor.get("processors", [processor])
    begins = [step["single"][0] for step in steps if step.get("single")]
    return any("SpecialToken" in first for first in begins) or (folder / "tokenizer.model").is_file()


def _special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token and the like, as texts."""
    settings: dict[str, Any] = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    texts = {name: value.get("content") if isinstance(value, dict) else value
             for name, value in settings.items() if name.endswith("_token")}  # fmt: skip
    return {name: value for name, value in texts.items() if isinstance(value, str)}


def _json(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}
