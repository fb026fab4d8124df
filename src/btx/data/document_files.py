"""Files and hub datasets → documents, in the order they are stored: finding the files and decoding their formats.

.jsonl, .jsonl.gz, .jsonl.zst   one JSON object a line; lines end at "\\n" and nowhere else, blank ones are skipped
.parquet                        one document a row; only the text column is read, batch by batch
.txt                            documents are separated by `document_separator` (empty: a file is one document);
                                "\\r\\n" and "\\r" count as "\\n", in the separator too, and line ends around a document
                                are left out
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any

from btx.data.json_lines import BLOCK, json_value, kind_of, numbered_lines, optional, pieces, refuse_half_characters
from btx.errors import DataError, first_few
from btx.files import home_filled
from btx.recipe.data import Source
from btx.system_errors import blame

ABOUT = ("readme", "license", "licence")
"""What files about the others are called: in a folder they are no documents."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
ROWS = 1024
NAME_IT = "Name the right one with `text:` in the source, or --text-key of btx analyze"


def located(path: str, root: str | None) -> Path:
    """Where a path of the recipe is: absolute, `~` filled in; relative ones start from `root`, else from the working
    directory."""
    return _absolute(root or ".") / home_filled(path)


def find_files(path: str, root: str | None) -> list[Path]:
    """The readable files that `path` (a file, a folder with all its subfolders, or a glob) names, absolute and sorted.

    The one place that says so: what is checked, hashed and read is the same. A folder is read with all its subfolders,
    those behind links too, but for hidden files and those called after `ABOUT`; a file that two links lead to comes
    once. In a glob `**` stands for any folders, a name in brackets that exists is that file.

    Args:
        root: folder that a relative `path` starts from; None is the working directory.

    Raises:
        DataError: nothing there, or nothing there that can be read.
    """
    full, named = located(path, root), _named(path, root)
    if named is None:
        hint = "no file matches" if has_magic(path) else "no such file or folder"
        raise DataError(f"{full}: {hint}; relative paths start from {'data.root' if root else 'the working directory'}")
    readable, others = named
    if not readable:
        not_read = first_few([file.name for file in others], 10) or "nothing"
        raise DataError(f"{full}: no readable file; formats: {', '.join(SUFFIXES)}; found: {not_read}")
    return readable


def files_not_read(path: str, root: str | None) -> list[Path]:
    """The files that `path` leads to and `find_files` leaves out: other formats, those called after `ABOUT`."""
    named = _named(path, root)
    return [] if named is None else named[1]


def _named(path: str, root: str | None) -> tuple[list[Path], list[Path]] | None:
    """The files `path` leads to, each once, sorted, hidden ones apart: those that are read, and the others; None if
    there is nothing."""
    base, full = _absolute(root or "."), located(path, root)
    if full.exists():
        matches = [full]
    elif has_magic(path):
        matches = [match for match in _expanded(base, path) if not match.name.startswith(".")]
    else:
        matches = []
    if not matches:
        return None
    files = _each_once(sorted({file for match in matches for file in _files_in(match)}))
    read = [file for file in files if file.name.lower().endswith(SUFFIXES) and (file == full or not _is_about(file))]
    return read, [file for file in files if file not in set(read)]


def all_files(folder: Path) -> list[Path]:
    """Every file of a dataset's folder but for hidden ones and those about others, sorted."""
    return _each_once(sorted(file for file in _files_in(folder) if not _is_about(file)))


def fixed_part(path: str, root: str | None) -> Path:
    """The folder below which `find_files` finds its files."""
    full = located(path, root)
    if full.is_dir():
        return full
    for parent in reversed(full.parents):
        if has_magic(parent.name) and not _is_called(parent):
            return parent.parent
    return full.parent


def read(files: Iterable[Path], source: Source) -> Iterator[str]:
    """The documents in `files`; `source` tells the text key and the separator.

    Raises:
        DataError: a file that is broken or holds no document; names the file and the line or row.
        UserError: the format needs a package that is not installed.
    """
    for file in files:
        empty = True
        try:
            for text in _documents(file, source):
                empty = empty and not text.strip()
                yield text
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 ({error.reason}); convert it, for example with iconv") from error
        except (OSError, EOFError, zlib.error) as error:
            blame(error)
            raise DataError(f"{file}: cannot be read, perhaps broken or cut off ({error})") from error
        if empty:
            raise DataError(f"{file}: this file holds no document; remove it or fill it")


def read_hub(source: Source, root: str | None) -> Iterator[str]:
    """The documents of a split of a hub dataset, or of a local folder that `datasets.load_dataset` reads.

    Raises:
        DataError: no such dataset, configuration, split or column; not reachable; broken rows.
        UserError: the package datasets is not installed.
    """
    datasets = optional("datasets")
    assert source.hub is not None
    folder = _absolute(root or ".") / source.hub
    name = str(folder) if folder.is_dir() else source.hub
    what = f"dataset {name!r}, split {source.split!r}"
    try:
        rows = datasets.load_dataset(
            name, source.subset, split=source.split, streaming=source.streaming, revision=source.revision
        )
        for number, row in enumerate(rows, 1):
            yield _text(row, source.text, f"{what}, row {number}")
    except DataError:
        raise
    except Exception as error:  # datasets raises errors of half a dozen libraries
        blame(error)
        raise DataError(f"{what}: cannot be read: {error}") from error


def _absolute(path: str) -> Path:
    return home_filled(path).absolute()


def _expanded(base: Path, pattern: str) -> Iterator[Path]:
    """What a glob names below `base`; `**` goes through links as a folder does, each real folder once."""
    pattern = _names_kept(base, str(home_filled(pattern)))
    before, anywhere, after = pattern.partition("**")
    if not anywhere:
        yield from (base / match for match in glob(pattern, root_dir=base))  # noqa: PTH207 (may be absolute)
        return
    wanted = re.compile("(?:.*/)?" + "/".join(map(_part, after.strip("/").split("/"))) if after.strip("/") else ".*")
    for top in glob(before or ".", root_dir=base):  # noqa: PTH207 (may be absolute)
        folder = base / top
        for file in _files_in(folder) if folder.is_dir() else ():
            if wanted.fullmatch(file.relative_to(folder).as_posix()):
                yield file


def _names_kept(base: Path, pattern: str) -> str:
    """A glob in which the brackets of folders that are called like that stand for themselves: `runs [2]/*.txt`."""
    parts = pattern.split("/")
    folders = [base / "/".join(parts[: number + 1]) for number in range(len(parts) - 1)]
    return "/".join([*(escape(part) if _is_called(folder) else part
                       for part, folder in zip(parts, folders, strict=False)), parts[-1]])  # fmt: skip


def _is_called(folder: Path) -> bool:
    """Whether brackets in a name of a glob are the name's own: a folder is called so."""
    return "[" in folder.name and not {"*", "?"} & set(folder.name) and folder.exists()


def _part(pattern: str) -> str:
    """One part of a glob as a regular expression that matches no slash."""
    if pattern == "**":
        return "(?:.*/)?[^/]*"
    body = fnmatch.translate(pattern).removeprefix("(?s:")[: -len(r")\Z")]
    return re.sub(r"(\\.|\[[^\]]*\])|\.", lambda found: found[1] or "[^/]", body)  # not in brackets, nor behind a \


def _files_in(path: Path) -> list[Path]:
    """The file itself, or all files below a folder, behind links too, except hidden ones."""
    if path.is_file():
        return [path]
    listed, been = list[Path](), set[str]()
    for folder, below, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = [] if real in been else sorted(name for name in below if not name.startswith("."))
        files = [] if real in been else [Path(folder) / name for name in names if not name.startswith(".")]
        listed += [file for file in files if file.is_file()]
        been.add(real)  # a link may lead back up
    return listed


def _is_about(file: Path) -> bool:
    return file.name.lower().split(".")[0] in ABOUT


def _each_once(files: Sequence[Path]) -> list[Path]:
    """The first of all paths that lead to the same file."""
    first: dict[str, Path] = {}
    for file in files:
        first.setdefault(os.path.realpath(file), file)
    return list(first.values())


def _documents(file: Path, source: Source) -> Iterator[str]:
    name = file.name.lower()
    if name.endswith(".parquet"):
        return _parquet(file, source.text)
    if name.endswith(".txt"):
        return _plain_text(file, source.document_separator)
    return _json_lines(file, source.text)


def _plain_text(file: Path, separator: str) -> Iterator[str]:
    with open(file, encoding="utf-8-sig") as opened:
        blocks = iter(partial(opened.read, 16 * BLOCK), "")
        separator = separator.replace("\r\n", "\n").replace("\r", "\n")  # as `open` gives line ends
        texts = pieces(blocks, separator) if separator else ["".join(blocks)]
        yield from (text.strip("\n") for text in texts)


def _json_lines(file: Path, key: str) -> Iterator[str]:
    for number, line in numbered_lines(file):
        where = f"{file}, line {number}"
        yield _text(json_value(line, where, "document"), key, where)


def _text(value: Any, key: str, where: str) -> str:
    """The string at `key` of one JSON object or dataset row."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: a {type(value).__name__}, not a JSON object like {{{json.dumps(key)}: ...}}")
    if key not in value:
        keys = ", ".join(map(repr, value)) or "none"
        raise DataError(f"{where}: no key {key!r}; keys there: {keys}. {NAME_IT}")
    text = value[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} is {kind_of(text)}, not a string")
    if not text.isascii():
        refuse_half_characters(text, where, key)
    return text


def _parquet(file: Path, column: str) -> Iterator[str]:
    optional("pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            columns = opened.schema_arrow.names
            if column not in columns:
                names = ", ".join(map(repr, columns)) or "none"
                raise DataError(f"{file}: no column {column!r}; columns there: {names}. {NAME_IT}")  # fmt: skip
            row = 0
            for batch in opened.iter_batches(batch_size=ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _text({column: value}, column, f"{file}, row {row}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: cannot be read: broken parquet ({error})") from error
