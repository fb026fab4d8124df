"""Text for Markdown files."""

from __future__ import annotations

import html
import re


def literal(text: object) -> str:
    """Text that Markdown shows as it is, in one line: no markup, no HTML, no link, no end of a table's cell."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~$@]|:(?=//))", r"\\\1", line)
