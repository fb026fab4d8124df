"""Files of conversations and of preferences: what a line may be, and what is refused. Plain Python.

    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}
    {"prompt": "2 + 3 = ", "completion": "5"}           texts, or both lists of messages
    {"prompt": "2 + 3 = ", "chosen": "5", "rejected": "6"}  likewise; without `prompt` it is what both begin with

These are the formats that TRL reads (https://huggingface.co/docs/trl/dataset_formats).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx.data.document_files import located
from btx.data.json_lines import json_objects, kind_of, refuse_half_characters
from btx.errors import DataError
from btx.recipe.align import Alignment

ROLES = ("system", "user", "assistant")
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class Conversation:
    """A prompt and what is learnt to be said to it."""

    where: str
    """File and line."""
    messages: tuple[dict[str, str], ...] = ()
    """Role and content of each message; empty where it is plain text."""
    learnt_from: int = 0
    """Number of the first message of which an answer is learnt."""
    prompt: str = ""
    """Plain text that is not learnt."""
    completion: str = ""
    """Plain text that is learnt."""

    @property
    def size(self) -> int:
        """UTF-8 bytes of its text."""
        return sum(
            len(text.encode()) for text in (self.prompt, self.completion, *(m["content"] for m in self.messages))
        )


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which the first is the better one."""

    chosen: Conversation
    rejected: Conversation

    @property
    def size(self) -> int:
        """UTF-8 bytes of its text, the prompt in both answers."""
        return self.chosen.size + self.rejected.size


Row = Conversation | Preference


def data_files(section: Alignment, root: str | None, name: str) -> list[Path]:
    """The files of a section of `align`, in the recipe's order.

    Args:
        root: folder that relative paths start from; None is the working directory.
        name: of the section, for messages.

    Raises:
        DataError: a file is not there, or of another format.
    """
    files = [located(path, root) for path in section.data]
    for file in files:
        if not file.is_file():
            what = "a folder; name its files" if file.is_dir() else "no such file"
            raise DataError(f"align.{name}.data: {file}: {what}; relative paths start from "
                            f"{'data.root' if root else 'the working directory'}")  # fmt: skip
        if not file.name.lower().endswith(SUFFIXES):
            raise DataError(
                f"align.{name}.data: {file}: one JSON object a line is read; formats: {', '.join(SUFFIXES)}"
            )
    return files


def read_rows(files: Sequence[Path], *, pairs: bool) -> Iterator[Row]:
    """What the lines of the files say, in order.

    Args:
        pairs: they are two answers each; else conversations.

    Raises:
        DataError: a file that cannot be read or holds nothing, a line that is broken or says something else.
    """
    of_line: Callable[[dict[str, Any], str], Row] = _preference if pairs else _conversation
    what = "pair of answers" if pairs else "conversation"
    for file in files:
        empty = True
        for where, line in json_objects(file, what):
            empty = False
            yield of_line(line, where)
        if empty:
            raise DataError(f"{file}: this file holds no {what}; remove it from the recipe or fill it")


def _conversation(line: Mapping[str, Any], where: str) -> Conversation:
    if "messages" in line:
        messages = _messages(line["messages"], where, "messages")
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{where}: no message is the assistant's, so there is nothing to learn")
        return Conversation(where, messages)
    if "prompt" not in line or "completion" not in line:
        raise _other_keys(line, where, '"messages", or "prompt" and "completion"')
    return _answered(line["prompt"], line["completion"], where, "completion")


def _preference(line: Mapping[str, Any], where: str) -> Preference:
    if "chosen" not in line or "rejected" not in line:
        raise _other_keys(line, where, '"prompt", "chosen" and "rejected"')
    chosen, rejected = line["chosen"], line["rejected"]
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise DataError(f"{where}: 'chosen' and 'rejected' are both texts, or both lists of messages")
    if chosen == rejected:
        raise DataError(f"{where}: 'chosen' and 'rejected' are the same: there is nothing to prefer")
    prompt = line.get("prompt")
    if prompt is None:
        prompt, chosen, rejected = _common_beginning(chosen, rejected, where)
    return Preference(
        _answered(prompt, chosen, where, "chosen"), _answered(prompt, rejected, where, "rejected")
    )  # fmt: skip


def _common_beginning(chosen: Any, rejected: Any, where: str) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) where both answers begin with the prompt, as TRL's `extract_prompt` takes them apart:
    a space between prompt and answer belongs to the answer."""
    shorter = min(len(chosen), len(rejected))
    same = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if same and isinstance(chosen, str) and chosen[same - 1] == " ":
        same -= 1
    if not same:
        raise DataError(f"{where}: there is no 'prompt', and 'chosen' and 'rejected' begin with nothing in common")
    return chosen[:same], chosen[same:], rejected[same:]


def _answered(prompt: Any, answer: Any, where: str, key: str) -> Conversation:
    """A prompt and its answer: both texts, or both lists of messages."""
    if isinstance(prompt, str) and isinstance(answer, str):
        for name, text in (("prompt", prompt), (key, answer)):
            refuse_half_characters(text, where, name)
        if not answer.strip():
            raise DataError(f"{where}: {key!r} is empty, so there is nothing to learn")
        return Conversation(where, prompt=prompt, completion=answer)
    if isinstance(prompt, list) and isinstance(answer, list):
        before = _messages(prompt, where, "prompt") if prompt else ()
        after = _messages(answer, where, key)
        if not any(message["role"] == "assistant" for message in after):
            raise DataError(f"{where}: {key!r} has no message of the assistant's, so there is nothing to learn")
        return Conversation(where, (*before, *after), learnt_from=len(before))
    raise DataError(f"{where}: 'prompt' and {key!r} are both texts, or both lists of messages")


def _messages(value: Any, where: str, key: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f'{where}: {key!r} is a list of messages, {{"role": ..., "content": ...}} each')
    return tuple(_message(message, f"{where}: message {number}") for number, message in enumerate(value, 1))


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise DataError(f'{where}: a message is {{"role": ..., "content": ...}}')
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise DataError(f"{where}: its role is {role!r}; roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where}: its content is {kind_of(content)}; it has to be text")
    if role == "assistant" and not content.strip():
        raise DataError(f"{where}: the assistant says nothing; leave the conversation out, or end it before")
    if more := sorted(name for name, said in message.items() if name not in ("role", "content") and said):
        raise DataError(f"{where}: {', '.join(more)}: only role and content are trained on; leave the rest out")
    refuse_half_characters(content, where, "content")
    return {"role": role, "content": content}


def _other_keys(line: Mapping[str, Any], where: str, wanted: str) -> DataError:
    return DataError(f"{where}: a line has {wanted}; keys there: {', '.join(map(repr, line)) or 'none'}")
