"""A model of the Hugging Face hub, written where a folder is taken: `hf:ORGANISATION/NAME`, `hf:ORG/NAME@REVISION`."""

from __future__ import annotations

import re
from typing import NamedTuple

PREFIX = "hf:"
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")


class HubName(NamedTuple):
    """A model of the hub."""

    repository: str
    """organisation/name."""
    revision: str | None
    """Branch, tag or commit; None: main."""


def is_hub_name(text: object) -> bool:
    """Whether a text, or a path made of it, names a model of the hub and no folder."""
    return str(text).startswith(PREFIX)


def hub_name(text: object) -> HubName:
    """The model that a text beginning with `hf:` names.

    Raises:
        ValueError: it is written otherwise.
    """
    repository, at, revision = str(text).removeprefix(PREFIX).partition("@")
    if not REPOSITORY.fullmatch(repository) or (at and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", revision)):
        raise ValueError(
            f"{text}: a model of the hub is written hf:ORGANISATION/NAME, or hf:ORGANISATION/NAME@REVISION for a "
            f"branch, tag or commit of it"
        )
    return HubName(repository, revision or None)
