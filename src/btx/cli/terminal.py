"""What commands print: tables that fit the terminal, and JSON."""

from __future__ import annotations

import json
from typing import Any

import typer

FILE_WIDTH = 200
"""Columns of tables that are not printed on a terminal."""


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
