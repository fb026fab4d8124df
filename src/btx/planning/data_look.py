"""A look into the data before anything runs: files, sizes, columns and the first documents of every domain.

Only the beginning of a source is read, so counts of what is larger are estimates; what is wrong there is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from btx.data import document_files
from btx.data.identity import own_sources
from btx.data.json_lines import json_objects
from btx.data.sources import naming, source_files
from btx.errors import first_few
from btx.planning.budgets import MOST_EPOCHS, reading
from btx.recipe.data import Source
from btx.recipe.mixtures import resolve
from btx.recipe.schema import Recipe
from btx.run_folder.folder import RunFolder

SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 200, 1_000_000
BYTES_A_TOKEN = 4
"""Of English text with a large vocabulary; less with a small one."""
UNPACKED = 3
"""Text in a compressed file, as a multiple of the file's size, where it is not read to its end."""


def look_into_data(run: RunFolder) -> list[dict[str, Any]]:
    """A row for each source of each domain whose text is not prepared yet.

    Returns:
        {"domain", "source", "from", "files", "bytes", "text", "columns", "documents", "estimated", "characters": median
        and longest of the documents looked at, "tokens": about, "held_out", "epochs": how often the stage that reads it
        most goes through it, about}; only the first three where the text is made, or on the hub.

    Raises:
        DataError: a file that is missing or broken, or without the column of text.
    """
    recipe, rows = run.recipe, list[dict[str, Any]]()
    needed = _tokens_needed(recipe)
    for domain in recipe.data.domains:
        stage = run.graph[f"data/{domain}"]
        if not run.is_to_make(stage):
            continue
        for number, source in own_sources(recipe.data, domain):
            where = source.path or source.hub or f"generated: {source.generate}"
            row: dict[str, Any] = {"domain": domain, "source": number, "from": where}
            if source.path is not None:
                row |= _looked_at(recipe, domain, source)
                row["epochs"] = needed.get(f"{domain}/{number}", 0.0) / max(1, row["tokens"])
            rows.append(row)
    return rows


def data_notes(rows: list[dict[str, Any]]) -> list[str]:
    """What is probably too little text: it is counted, and refused, once it is prepared."""
    return [
        f"domain {row['domain']!r}: about {row['tokens']:,} tokens, read {row['epochs']:,.0f} times over in one stage; "
        f"more than {MOST_EPOCHS} times is refused: add text or lower the tokens"
        for row in rows if row.get("epochs", 0) > MOST_EPOCHS
    ]  # fmt: skip


def _looked_at(recipe: Recipe, domain: str, source: Source) -> dict[str, Any]:
    files, held_out = source_files(source, domain, recipe.data)
    with naming(domain):
        sample, whole = _sample(document_files.read(files, source))
    size = sum(file.stat().st_size for file in files)
    lengths = [len(text.encode()) for text in sample]
    text = sum(lengths) if whole else sum(map(text_bytes, files))
    text = min(text, source.max_bytes or text)
    share = f"{recipe.data.held_out:.0%} of the documents"
    return {
        "files": len(files), "bytes": size, "text": text, "columns": columns(files[0]) if files else [],
        "documents": len(sample) if whole else round(text / max(1.0, sum(lengths) / len(sample))),
        "estimated": not whole, "characters": [round(median(map(len, sample))), max(map(len, sample))],
        "tokens": text // BYTES_A_TOKEN,
        "held_out": first_few([file.name for file in held_out], 3, " ...") or share,
    }  # fmt: skip


def _sample(documents: Iterator[str]) -> tuple[list[str], bool]:
    """The first documents that are not empty, and whether they are all there is."""
    sample, size = list[str](), 0
    for text in itertools.islice(documents, SAMPLE_DOCUMENTS):
        size += len(text)
        sample.append(text)
        if size > SAMPLE_CHARACTERS:
            break
    return sample, next(documents, None) is None


def text_bytes(file: Path) -> int:
    """Bytes of text in a file, about: what is compressed is not read."""
    return file.stat().st_size * (UNPACKED if file.name.lower().endswith((".gz", ".zst", ".parquet")) else 1)


def columns(file: Path) -> list[str]:
    """Keys of the first line, or the columns of a table."""
    name = file.name.lower()
    if name.endswith(".parquet"):
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(file).names)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return list(next(json_objects(file, "document"), ("", {}))[1])
    return []


def _tokens_needed(recipe: Recipe) -> Mapping[str, float]:
    """Component of a domain → tokens that the stage takes from it that takes the most."""
    needed: dict[str, float] = {}
    for weights, tokens, _ in reading(recipe):
        for name, _, weight in resolve(recipe, weights):
            needed[name] = max(needed.get(name, 0.0), tokens * weight)
    return needed
