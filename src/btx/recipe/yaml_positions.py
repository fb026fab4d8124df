"""YAML text → plain Python values, with the place of every key and value, so that errors can name line and column.

What is read is YAML 1.2's core schema plus `1_000_000`: `1e-4` is a number (PyYAML alone makes it a string); `no`,
`on`, `007` and `2024-01-01` stay text, and so does everything in quotes. Refused: duplicate keys, keys that are no
text, tags such as `!!python/object`, anchors and aliases (a few hundred bytes of them can expand to gigabytes) and
nesting deeper than `MAX_DEPTH`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import yaml

MAX_DEPTH = 64
LARGEST_WHOLE = 2**63 - 1
"""The largest whole number, and the smallest below zero: what is larger fits into nobody's integers."""
MAX_VALUES = 10_000
"""Keys and values a text may have: PyYAML reads so many in a third of a second, the longest recipe of ours has 194."""

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of a document to one of its values."""

_NULL, _BOOL, _INT, _FLOAT, _STR, _SEQ, _MAP = (
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")
)
_DECIMAL = re.compile(
    r"""^(?: [-+]?(?:[0-9](?:_?[0-9])*)?\.[0-9](?:_?[0-9])*(?:[eE][-+]?[0-9]+)?   # 1.5, .5, 1.5e-4
           | [-+]?[0-9](?:_?[0-9])*(?:\.|\.?[eE][-+]?[0-9]+)                     # 1., 1e-4
           | [-+]?\.(?:inf|Inf|INF) | \.(?:nan|NaN|NAN) )$""",
    re.VERBOSE,
)
RESOLVERS = (
    (_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    (_INT, re.compile(r"^[-+]?(?:0|[1-9](?:_?[0-9])*|0x[0-9a-fA-F]+|0o[0-7]+)$"), list("-+0123456789")),
    (_FLOAT, _DECIMAL, list("-+0123456789.")),
)
"""Plain scalars that are no text: tag, pattern, first characters; what PyYAML's `add_implicit_resolver` takes."""


class Place(NamedTuple):
    """Where something was written: line and column from 1; `line` 0 means the source as a whole (an override)."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


class Problem(NamedTuple):
    """Something wrong at a place; `path` is the dotted path shown before the text, if any."""

    place: Place
    path: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.place), self.path, self.text) if part)


@dataclass
class Document:
    """Values of a YAML text, the places of its keys and values, and what was wrong short of a syntax error."""

    value: Any
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def locate(self, path: KeyPath) -> KeyPath:
        """The longest written path along `path`; levels that were not written (short forms) are passed over."""
        here: KeyPath = ()
        for part in path:
            if (*here, part) in self.values:
                here = (*here, part)
        return here


class YamlSyntaxError(Exception):
    """The text is no YAML that is read here; carries the one `problem` at which reading stopped."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class _Loader(yaml.SafeLoader):
    """Composes nodes only: no anchors, no aliases, bounded depth and number, numbers as in YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors (&name) and aliases (*name) are not read: write the value out; "
                "a text that starts with & or * goes in quotes",
                problem_mark=event.start_mark,
            )
        if self.depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        self.values += 1
        if self.values > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_VALUES:,} keys and values, so it is no recipe",
                                       problem_mark=event.start_mark)  # fmt: skip
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _tag, _pattern, _first in RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)


def read_yaml(text: str, source: str) -> Document:
    """Read one YAML document; `source` is what places call it.

    Raises `YamlSyntaxError` where reading cannot go on. Lesser problems (duplicate keys, tags) are collected in
    `Document.problems`, and the rest is read all the same.
    """
    root = compose(text, source)
    document = Document(None, values={(): _place(source, root) if root else Place(source, 1, 1)})
    if root is not None:
        document.value = _read_node(root, (), source, document)
    return document


def compose(text: str, source: str) -> yaml.Node | None:
    """The document's node tree, whose marks know the offsets in `text`; None for an empty text. Not to be changed: it
    is kept for the next reader of this text (every row of a sweep reads the same recipe)."""
    try:
        return _nodes(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = " ".join(part for part in (error.context, error.problem) if part)
        if "alias" in words and "quotes" not in words:
            words += "; a text that starts with * or & goes in quotes"
        place = Place(source, mark.line + 1, mark.column + 1) if mark else Place(source, 1, 1)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = Place(source, before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1)
        words = f"character {chr(error.character)!a} is not allowed in YAML"
    raise YamlSyntaxError(Problem(place, "", f"cannot be read: {words}"))


@lru_cache(maxsize=16)
def _nodes(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    except (ValueError, OverflowError) as error:  # PyYAML lets chr() fail on "\UFFFFFFFF"
        raise yaml.MarkedYAMLError(
            problem="an escape or a number that stands for no character or number", problem_mark=loader.get_mark()
        ) from error


def _place(source: str, node: yaml.Node) -> Place:
    return Place(source, node.start_mark.line + 1, node.start_mark.column + 1)


def _read_node(node: yaml.Node, path: KeyPath, source: str, document: Document) -> Any:
    """Value of a node; records places and problems in `document`."""
    document.values[path] = _place(source, node)
    if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
        return _read_mapping(node, path, source, document)
    if isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
        return [_read_node(item, (*path, index), source, document) for index, item in enumerate(node.value)]
    try:
        return _scalar(node)
    except ValueError as error:
        document.problems.append(Problem(document.values[path], dotted(path), str(error)))
        return None


def _read_mapping(node: yaml.MappingNode, path: KeyPath, source: str, document: Document) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = _place(source, key_node)
        if key_node.tag != _STR or not isinstance(key_node, yaml.ScalarNode):
            plain = isinstance(key_node, yaml.ScalarNode)
            text = f"key {key_node.value} is no text: put it in quotes" if plain else "a key has to be a text"
            document.problems.append(Problem(place, dotted(path), text))
            continue
        try:
            key = _text(key_node.value)
        except ValueError as error:
            document.problems.append(Problem(place, dotted(path), str(error)))
            continue
        if key in result:
            first = document.keys[(*path, key)].line
            text = f"key {key!r} is given twice (first in line {first}): remove one"
            document.problems.append(Problem(place, dotted((*path, key)), text))
            continue
        document.keys[(*path, key)] = place
        result[key] = _read_node(value_node, (*path, key), source, document)
    return result


def _scalar(node: yaml.Node) -> Any:
    """Python value of a scalar node; ValueError says what is wrong with it."""
    if not isinstance(node, yaml.ScalarNode) or node.tag not in (_NULL, _BOOL, _INT, _FLOAT, _STR):
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise ValueError(f"tag {tag!r} is not read: a recipe is text, numbers, lists and mappings")
    value: str = node.value
    if node.tag == _STR:
        return _text(value)
    if not any(tag == node.tag and pattern.match(value) for tag, pattern, _ in RESOLVERS):
        raise ValueError(f"{value!r} does not fit its tag: remove the tag")  # such as `!!int three`
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return value.lower() == "true"
    if node.tag == _INT:
        if len(value) > 1000 or abs(whole := int(value, 0)) > LARGEST_WHOLE:
            raise ValueError(f"a whole number of {len(value)} digits is too long, the largest is {LARGEST_WHOLE:,}; "
                             f"a text goes in quotes")  # fmt: skip
        return whole
    number = float(value.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if math.isnan(number):
        raise ValueError("not a number (.nan) is no value of a recipe")
    if math.isinf(number) and "inf" not in value.lower():
        raise ValueError(f"{value[:40]} is too large for a number; a text goes in quotes")
    return number


def _text(value: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{value[:40]!a} holds half of a surrogate pair, which is no character")
    return value


def dotted(path: KeyPath) -> str:
    """`data.domains.math.0`; parts that are no plain words are quoted."""
    return ".".join(str(part) if re.fullmatch(r"[\w.-]+", str(part)) else repr(part) for part in path)
