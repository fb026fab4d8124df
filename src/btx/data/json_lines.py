"""Files with one JSON object a line, gzipped or not. Plain Python."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from btx.errors import DataError
from btx.system_errors import blame


def json_objects(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line that is not empty; the place is `file:number`.

    Lines end at "\\n" only, as JSON strings may hold other line separators.

    Args:
        path: `.jsonl` or `.jsonl.gz`.
        what: what a line is, for messages: `question`.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _object(line, where, what)
    except (OSError, EOFError, zlib.error) as error:
        blame(error)
        raise DataError(f"{path}: cannot be read: {error}") from error


def _object(line: bytes, where: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not a line of JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{where}: a {what} is a JSON object, not {type(found).__name__}")
    return found
