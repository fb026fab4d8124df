"""What a domain's data are: its sources' settings and what its files hold. Where files lie, what they are called and
when they were written is no part of it. Plain Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from glob import has_magic
from pathlib import Path, PurePath
from typing import Any

from btx.data.document_files import SUFFIXES, located
from btx.data.sources import naming, owns_held_out, source_files
from btx.errors import DataError
from btx.files import content_sha256, value_hash
from btx.recipe.data import Data, Source

NOT_OF_THE_TEXT = {"path", "weight", "domain", "streaming"}
"""Keys of a source that say where it is, or how it is read or mixed, but not what it holds."""


def own_sources(data: Data, domain: str) -> list[tuple[int, Source]]:
    """The sources of a domain that have documents of their own and a weight, with their numbers."""
    sources = enumerate(data.domains[domain].sources)
    return [(number, source) for number, source in sources if source.domain is None and source.weight]


def domain_identity(
    data: Data, domain: str, rng_seed: int, *, recorded: Mapping[str, Any] | None = None, names: Iterable[str] = ()
) -> dict[str, Any]:
    """Everything that decides a domain's own documents and their sides, but for the other domains, as a JSON value.

    Files stand in the order in which they are read, each as [format, SHA-256].

    Args:
        recorded: what the files of each source held, for a machine where they are not.
        names: paths of those files, as they were: a path of the recipe that names none of them is another one.

    Raises:
        DataError: a file is missing; names the domain.
    """
    sources = {str(number): source for number, source in own_sources(data, domain)}
    if recorded is not None:
        _refuse_other_paths(data, domain, {part for name in names for part in PurePath(name).parts}, recorded)
    else:
        with naming(domain):
            recorded = {number: _files_of(source, domain, data) for number, source in sources.items()}
    return {number: _settings(data, domain, source, rng_seed, recorded[number]) for number, source in sources.items()}


def held_out_identity(identity: dict[str, Any]) -> str:
    """Hash of everything that decides which documents a domain holds out, from its `domain_identity`."""
    sources = []
    for source in identity.values():
        held_out = source["files"]["held_out"]
        if source["owns_held_out"]:  # where there are held-out files, what is for training decides nothing
            sources.append(source | {"files": {"held_out": held_out} if held_out else source["files"]})
    return value_hash(sources)


def domain_files(data: Data, domain: str) -> dict[str, str]:
    """Path of every local file that a domain is read from → its SHA-256, to name the one that changed."""
    files = [source_files(source, domain, data) for _, source in own_sources(data, domain)]
    return {str(file): content_sha256(file) for train, held_out in files for file in (*train, *held_out)}


def _files_of(source: Source, domain: str, data: Data) -> dict[str, list[list[str]]]:
    """[format, SHA-256] of each file of a source's two sides."""
    sides = zip(("train", "held_out"), source_files(source, domain, data), strict=True)
    return {side: [[_format(file), content_sha256(file)] for file in files] for side, files in sides}


def _settings(data: Data, domain: str, source: Source, rng_seed: int, files: Mapping[str, Any]) -> dict[str, Any]:
    # A dataset in a folder is what its files hold.
    left_out = NOT_OF_THE_TEXT | ({"hub"} if source.hub is not None and files["train"] else set())
    return {
        **source.model_dump(mode="json", exclude=left_out, exclude_none=True, exclude_defaults=True),
        "files": dict(files),
        "held_out_share": data.held_out,
        "owns_held_out": owns_held_out(source, domain, data),
        **({"rng_seed": rng_seed} if source.generate is not None else {}),
    }


def _refuse_other_paths(data: Data, domain: str, known: set[str], recorded: Mapping[str, Any]) -> None:
    """Refuse sources that are not those whose files are recorded, as far as their paths tell.

    Raises:
        DataError: names the path.
    """
    numbered = own_sources(data, domain)
    named = [
        path for _, source in numbered for path in (source.path, data.domains[domain].held_out) if path is not None
    ]
    for path in named:
        if not has_magic(path) and PurePath(path).name not in known:
            raise DataError(f"domain {domain!r}: {located(path, data.root)}: no such file or folder, and not what the "
                            f"domain was prepared from")  # fmt: skip
    if {str(number) for number, _ in numbered} != recorded.keys():
        raise DataError(
            f"domain {domain!r}: its sources are not those it was prepared from, and files of it are missing"
        )


def _format(file: Path) -> str:
    return next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), file.suffix)
