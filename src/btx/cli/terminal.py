"""What commands print: tables that fit the terminal, and JSON."""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import os
import sys
from typing import Any, NoReturn

import typer

from btx.process import say_no_more

FILE_WIDTH = 200
"""Columns of tables that are not printed on a terminal."""

PLAIN = str.maketrans({"·": "-", "→": "->", "×": "x", "±": "+-", "…": "...", "α": "alpha", "²": "2", "λ": "lambda"})
"""How signs are written where the terminal's encoding has them not."""


def prepare_streams() -> None:
    """Let standard output and error take any text, whatever their encoding, be there even where they are closed, and
    show nothing of what libraries tell each other; let standard input give any bytes, to be refused where text is
    wanted."""
    codecs.register_error("btx", _written_plainly)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # started with it closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="btx")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    for talker in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it is installed, and both
        logging.getLogger(talker).setLevel(logging.ERROR)  # then tell of kernels that nobody has asked for


def _written_plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end].translate(PLAIN)
    return signs.encode("ascii", "backslashreplace").decode("ascii"), error.end


def end(exit_code: int, message: str = "", *, try_output: bool = False) -> NoReturn:
    """Print what is left to print and a last message, and end; an output that nobody reads any more is no error.

    Args:
        try_output: print an empty line to see whether it was standard output that could not be written.
    """
    try:
        print(end="\n" if try_output else "", flush=True)
    except BrokenPipeError:
        say_no_more()
    except OSError as error:  # a full disk, a terminal that is gone
        say_no_more()
        exit_code, message = 1, f"error: standard output cannot be written ({error.strerror})"
    with contextlib.suppress(OSError):
        print(message, end="\n" if message else "", file=sys.stderr, flush=True)
    sys.exit(exit_code)


def remark(line: str) -> None:
    """Print a line that is no part of what was asked for: to standard error."""
    typer.echo(line, err=True)


def silent(line: str) -> None:
    """Print nothing: where JSON is asked for, it is all there is."""


def show(*renderables: Any) -> None:
    """Print tables and lines; what stands in them is shown as it is, brackets and colons too."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    if not console.is_terminal:  # a file or pipe has no width: cut nothing off
        console = Console(markup=False, emoji=False, width=FILE_WIDTH)
    for renderable in renderables:
        console.print(renderable)


def show_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=1))
