"""Files of lines, packed or not, with one JSON object a line. Plain Python."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, AnyStr

from btx.errors import DataError, UserError
from btx.system_errors import blame

BLOCK = 1 << 20


def json_objects(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line that is not empty; the place is `file:number`.

    Args:
        path: `.jsonl`, `.jsonl.gz` or `.jsonl.zst`.
        what: what a line is, for messages: `question`.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
        UserError: zstandard is needed and not installed.
    """
    try:
        for number, line in numbered_lines(path):
            where = f"{path}:{number}"
            value = json_value(line, where, what)
            if not isinstance(value, dict):
                raise DataError(f"{where}: a {what} is a JSON object, not {type(value).__name__}")
            yield where, value
    except (OSError, EOFError, zlib.error) as error:
        blame(error)
        raise DataError(f"{path}: cannot be read: {error}") from error


def numbered_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1 and without a byte order mark.

    Lines end at "\\n" only, as JSON strings may hold other line separators.
    """
    for number, line in enumerate(pieces(_blocks(file), b"\n"), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def json_value(line: bytes, where: str, what: str) -> Any:
    """The JSON value of a line; `where` and `what` are for messages.

    Raises:
        DataError: it is not UTF-8, or not JSON.
    """
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); each line has to be one JSON object, a {what}") from error


def kind_of(value: Any) -> str:
    """What a value of JSON is, for messages: `null`, `a list`."""
    return "null" if value is None else f"a {type(value).__name__}"


def refuse_half_characters(value: Any, where: str, key: str) -> None:
    """Refuse text that JSON can spell, "\\ud83d", but that is no Unicode: half of a surrogate pair.

    Args:
        value: of `key`: text, or lists and objects of it.

    Raises:
        DataError: names the place and the key.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{where}: {key!r} is not valid Unicode ({error.reason}): it holds {half!a}, half of a pair; "
                        f"mend or remove it") from error  # fmt: skip


def pieces(blocks: Iterable[AnyStr], separator: AnyStr) -> Iterator[AnyStr]:
    """What stands between the separators in a text that comes in blocks; work and memory grow with a piece's length."""
    nothing: AnyStr = separator[:0]
    before: list[AnyStr] = []  # of the piece that is not complete
    tail: AnyStr = nothing
    for block in blocks:
        parts = (tail + block).split(separator)
        for part in parts[:-1]:
            yield nothing.join(before) + part
            before = []
        certain = max(0, len(parts[-1]) - len(separator) + 1)  # the rest may be the start of a separator
        before.append(parts[-1][:certain])
        tail = parts[-1][certain:]
    yield nothing.join(before) + tail


def optional(package: str) -> Any:
    """A package of the extra `data`; raises `UserError` if it is not installed."""
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        raise UserError(f"this source needs the package {package}: pip install 'branchtrainmix[data]'") from error


def _blocks(file: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file, in blocks."""
    name = file.name.lower()
    if name.endswith(".zst"):
        yield from _zstd_blocks(file)
        return
    with gzip.open(file, "rb") if name.endswith(".gz") else open(file, "rb") as opened:
        while block := opened.read(BLOCK):
            yield block


def _zstd_blocks(file: Path) -> Iterator[bytes]:
    """All frames of a zstd file; zstandard's own stream reader takes a cut-off file for a complete one."""
    zstandard = optional("zstandard")
    frame = None
    try:
        with open(file, "rb") as opened:
            while block := opened.read(BLOCK):
                while block:
                    if frame is None:
                        frame = zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(block)
                    block = frame.unused_data if frame.eof else b""
                    if frame.eof:
                        frame = None
    except zstandard.ZstdError as error:
        raise DataError(f"{file}: cannot be read: broken zstd ({error})") from error
    if frame is not None:
        raise DataError(f"{file}: cut off: the last zstd frame is incomplete")
