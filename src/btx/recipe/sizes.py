"""Sizes in bytes as users write them: 5GB, 500MB, 750000. Plain Python."""

from __future__ import annotations

import math
import re

from btx.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(size: int | str) -> int:
    """The bytes of a size: `5GB` is 5·10⁹, `5GiB` is 5·2³⁰, a bare number (`24e9` too) is bytes.

    Raises:
        UserError: not a size, or not above 0.
    """
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([A-Za-z]*)\s*", str(size))
    if not matched or matched.group(2).upper() not in _UNITS:
        raise UserError(f"{size!r} is not a size; write 5GB, 500MB or a number of bytes")
    count = float(matched.group(1)) * _UNITS[matched.group(2).upper()]
    if count == math.inf:
        raise UserError(f"{size!r} is not a size: no machine has so many bytes")
    if (value := int(count)) < 1:
        raise UserError(f"{size!r}: a size has to be at least one byte")
    return value
