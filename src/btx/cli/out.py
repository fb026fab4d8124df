"""The commands that give a model to others: export (GGUF, Ollama), push (the Hugging Face hub)."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from btx.cli.plan import AsJson
from btx.cli.run_folders import ModelArgument, is_run, open_run
from btx.cli.terminal import remark, show_json, silent
from btx.errors import UserError
from btx.model_files.hub import shown_name
from btx.process import Log, ending_at_once

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be written, or sent, and do neither.")]


class Format(StrEnum):
    """What a model is exported to."""

    gguf = "gguf"
    ollama = "ollama"


class WeightType(StrEnum):
    """Types of weights in a GGUF file."""

    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    f32 = "f32"


def export(
    model: ModelArgument,
    to: Annotated[Format, typer.Option(help="One GGUF file, or a folder with it and a Modelfile for Ollama.")],
    output: Annotated[Path | None, typer.Option(
        "-o", "--output", help="File (gguf) or folder (ollama) to write; default: named like the model, here.",
        show_default=False)] = None,
    weights: Annotated[WeightType, typer.Option("--type", help="Type of the weights.")] = WeightType.f16,
    converter: Annotated[Path | None, typer.Option(
        help="Checkout of llama.cpp, or its convert_hf_to_gguf.py; default: $LLAMA_CPP, else the installed one.",
        show_default=False)] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write a run's model, or any model folder, for llama.cpp or Ollama."""
    from btx.publishing.gguf import find_converter, gguf_bytes, write_gguf
    from btx.publishing.gguf_refusals import check_gguf

    folder, name = _chosen(model)
    target = output or Path(f"{name}.gguf" if to is Format.gguf else f"{name}-ollama")
    if target.exists():
        raise UserError(f"{target}: exists already; choose another name (-o) or remove it")
    notes = check_gguf(folder)
    file = target if to is Format.gguf else target / "model.gguf"
    facts: dict[str, Any] = {"model": str(folder), "to": str(to), "output": str(target), "type": str(weights),
            "bytes": gguf_bytes(folder, weights), "notes": notes}  # fmt: skip
    say = silent if as_json else typer.echo
    for note in notes:
        say(f"warning: {note}")
    if dry_run:
        say(f"{file}: about {facts['bytes'] / 1e6:,.1f} MB ({weights}); nothing was written")
    else:
        place = find_converter(converter)
        with ending_at_once(f"stopped; nothing was written to {target}"):
            if to is Format.gguf:
                write_gguf(folder, target, weights, place, say)
            else:
                facts["notes"] = [*notes, *_write_ollama(folder, target, weights, place, say)]
        facts["bytes"] = file.stat().st_size
        say(f"{file}: {facts['bytes'] / 1e6:,.1f} MB ({weights})")
        say(f"next: cd {target} && ollama create {name} && ollama run {name}" if to is Format.ollama else
            f"next: llama-cli -m {file}")  # fmt: skip
    if as_json:
        show_json(facts)


def _write_ollama(folder: Path, target: Path, weights: str, converter: str, say: Log) -> list[str]:
    from btx.files import atomic_folder
    from btx.model_files.beside_weights import LEGAL, check_links, files_of
    from btx.publishing.gguf import write_gguf
    from btx.publishing.ollama import modelfile

    check_links(folder, LEGAL)
    licences = files_of(folder, ("LICENSE*", "LICENCE*"))
    licence = next((file.read_text("utf-8", errors="replace") for file in licences), None)
    text, note = modelfile(folder, "model.gguf", licence)
    with atomic_folder(target) as beside:
        write_gguf(folder, beside / "model.gguf", weights, converter, say)
        (beside / "Modelfile").write_text(text, "utf-8")
    if note is not None:
        say(f"note: {note}")
    return [note] if note else []


def push(
    model: ModelArgument,
    name: Annotated[str, typer.Argument(metavar="ORG/NAME", help="What it is called on the hub.")],
    public: Annotated[bool, typer.Option(
        "--public", help="Everybody sees it; without this a new one is private.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Put a run's model, or any model folder, on the Hugging Face hub, with a card of results, data and licence."""
    from btx.publishing.hub_card import origin_of_folder, origin_of_run
    from btx.publishing.push import push as push_files
    from btx.publishing.push import upload_of

    folder, _ = _chosen(model)
    run = open_run(model) if is_run(model) else None
    origin = origin_of_folder(folder) if run is None else origin_of_run(run)
    if run is not None and not origin.results:
        remark(f"warning: evaluate is {run.state(run.graph['evaluate'])}: the card has no results; `btx run {model}` "
               f"goes on")  # fmt: skip
    upload = upload_of(folder, origin, name, model / "report" if origin.results else None)
    sizes = {file: len(it) if isinstance(it, bytes) else it.stat().st_size for file, it in upload.items()}
    say = silent if as_json else typer.echo
    facts: dict[str, Any] = {"name": name, "public": public, "files": sizes, "licence": origin.licence, "commit": None}
    if dry_run:
        for file, size in sizes.items():
            say(f"{size:>15,} {file}")
        say(f"{sum(sizes.values()):>15,} bytes would go to {name} ({'public' if public else 'private'}); none were")
    else:
        facts["commit"] = push_files(upload, name, public=public, log=say)
        say(f"{facts['commit']}")
    if origin.licence is None:
        say("note: the seed model's licence is unknown; the card says so. A LICENSE file in its folder names one")
    if as_json:
        show_json(facts)


def _chosen(model: Path) -> tuple[Path, str]:
    """The folder of a run's model, or the model folder itself; and what to call it.

    Raises:
        UserError: the run has no finished model, or a stale one.
    """
    from btx.run_folder.finished_models import last_model

    if not is_run(model):
        return model, shown_name(model)
    return last_model(open_run(model), remark, refuse_stale=True).folder, model.resolve().name
