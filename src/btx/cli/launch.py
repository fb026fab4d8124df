"""`btx launch`: a run as text to submit by hand; and the command that such a text begins with."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from btx.cli.plan import Overrides, RecipeArgument, resolved_recipe
from btx.errors import UserError


class Engine(StrEnum):
    """What a text can be for."""

    SLURM = "slurm"
    JOBSET = "jobset"
    SKY = "sky"
    SHELL = "shell"


def launch(
    recipe: RecipeArgument,
    engine: Annotated[Engine, typer.Option(
        "--for", help="slurm: batch scripts; jobset: Kubernetes; sky: SkyPilot; shell: a script of this machine.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the files; default: print.")] = None,
) -> None:  # fmt: skip
    """The jobs of a run as text to submit by hand; starts nothing and needs no engine."""
    from btx.running.launch_texts import launch_text

    texts = launch_text(resolved_recipe(recipe, overrides), engine.value)
    if output is None:
        for name, text in texts.items():
            typer.echo(f"# ==== {name} ====\n{text}" if len(texts) > 1 else text, nl=False)
        return
    from btx.files import write_text

    _refuse_to_replace(output, texts)
    output.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(output / name, text)
        typer.echo(output / name)


def _refuse_to_replace(folder: Path, texts: dict[str, str]) -> None:
    """Files that say something else are somebody's: perhaps changed by hand since."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"-o {folder}: this is a file; give a folder")
    others = [name for name, text in texts.items() if (folder / name).exists() and not _says(folder / name, text)]
    if others:
        raise UserError(f"-o {folder}: {', '.join(others)} is there and says something else, and is not overwritten: "
                        f"remove it or choose another folder")  # fmt: skip


def _says(file: Path, text: str) -> bool:
    try:
        return file.read_text("utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False


def begin(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """What the text of `btx launch` begins with: the run folder, with nothing in it but its recipe."""
    from btx.running.preflight import begin as begin_run

    typer.echo(begin_run(resolved_recipe(recipe, overrides)).path)
