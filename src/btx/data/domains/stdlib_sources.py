"""The interpreter's own standard library, read once: code without docstrings, and the docstrings."""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import decode_source
from inspect import cleandoc
from pathlib import Path
from textwrap import dedent

from btx.errors import DataError

LEFT_OUT_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "idle_test", "idlelib", "lib-dynload", "pydoc_data", "site-packages",
    "test", "tests", "turtledemo", "distutils", "lib2to3", "tkinter",
}  # fmt: skip
"""Tests, tables, installed packages, and (the last three) what not every Python has."""
LEFT_OUT_FILES = {"html/entities.py", "locale.py", "stringprep.py"}
"""Files that are mostly tables."""
LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
"""Files and folders written when Python was built or installed."""
PIECE_BYTES = 2_000
"""A document of code ends at the next top-level statement once it has so many bytes..."""
LONG_PIECE_BYTES = 4_000
"""...and at the next method of a top-level class once it has so many."""


@dataclass(frozen=True)
class SourceFile:
    """One module: its code without docstrings, cut into pieces, and its docstrings in order."""

    path: str
    pieces: list[str]
    docstrings: list[str]


@cache
def standard_library() -> list[SourceFile]:
    """All modules by path, tests and tables left out. Raises DataError where Python comes without its sources."""
    root = sysconfig.get_path("stdlib")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the library's own code
        files = [read_source(name, Path(root, name).read_bytes()) for name in _module_paths(root)]
    if not files:
        raise DataError(
            f"no standard library sources in {root}: the generators 'code' and 'general' read them; "
            "use a Python that has its .py files, or other sources for these domains"
        )
    return files


def read_source(name: str, source: bytes) -> SourceFile:
    """Take a module's docstrings out, leaving every other line as it is, and cut it into pieces."""
    text = decode_source(source)
    tree = ast.parse(text)
    lines: list[str | None] = [*text.split("\n")]  # as ast counts them: splitlines would also split at form feeds
    docstrings = []
    for docstring, alone in _docstrings(tree):
        docstrings.append(cleandoc(str(docstring.value)))
        _take_out(lines, docstring, alone)
    return SourceFile(name, _cut(lines, *_places_to_cut(tree, lines)), docstrings)


def documented_functions(name: str) -> list[str]:
    """The functions and methods of a standard library module that have a docstring of more than one line, docstring
    included, without their common indentation, in order."""
    text = decode_source(Path(sysconfig.get_path("stdlib"), name).read_bytes())
    lines = text.split("\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the library's own code
        tree = ast.parse(text)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    members = [*tree.body, *(node for parent in classes for node in parent.body)]
    functions = []
    for node in members:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "\n" in (ast.get_docstring(node) or ""):
            functions.append(dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])))
    return functions


def _module_paths(root: str) -> list[str]:
    """Paths of the modules below `root`, with forward slashes, sorted."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT_FOLDERS]
        names += [Path(folder, file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    return sorted(name for name in names if name not in LEFT_OUT_FILES and not name.startswith(LEFT_OUT_PREFIXES))


def _docstrings(node: ast.AST) -> Iterator[tuple[ast.Constant, bool]]:
    """The docstrings in and under a node, each with whether it is the whole body."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
        match node.body[0]:
            case ast.Expr(value=ast.Constant(value=str()) as docstring):
                yield docstring, len(node.body) == 1
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, ()):
            yield from _docstrings(child)


def _take_out(lines: list[str | None], docstring: ast.Constant, alone: bool) -> None:
    """Replace a docstring in place: lines that vanish become None, so that line numbers stay true."""
    first, last = docstring.lineno - 1, (docstring.end_lineno or docstring.lineno) - 1
    before = (lines[first] or "").encode()[: docstring.col_offset].decode()
    after = (lines[last] or "").encode()[docstring.end_col_offset :].decode()
    lines[first : last + 1] = [None] * (last + 1 - first)
    if alone or after.lstrip().startswith(";"):
        lines[first] = f"{before}pass{after}"
    elif (before + after).strip():
        lines[first] = before + after
    elif last + 1 < len(lines) and lines[last + 1] == "":
        lines[last + 1] = None


def _places_to_cut(tree: ast.Module, lines: list[str | None]) -> tuple[set[int], set[int]]:
    """Line indices where top-level statements begin, and methods of top-level classes, with the comments above."""

    def begin(node: ast.stmt) -> int:
        index = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", ()))]) - 1
        while index and (lines[index - 1] or "").lstrip().startswith("#"):
            index -= 1
        return index

    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    members = [node for parent in classes for node in parent.body]
    methods = {begin(node) for node in members if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return {begin(node) for node in tree.body}, methods


def _cut(lines: list[str | None], statements: set[int], methods: set[int]) -> list[str]:
    """The remaining lines in pieces that, joined, are the whole module again."""
    pieces: list[str] = []
    piece: list[str] = []
    size = 0
    for index, line in enumerate(lines):
        if (size >= PIECE_BYTES and index in statements) or (size >= LONG_PIECE_BYTES and index in methods):
            pieces.append("".join(piece))
            piece, size = [], 0
        if line is not None:
            piece.append(f"{line}\n")
            size += len(line) + 1
    return [*pieces, "".join(piece)]
