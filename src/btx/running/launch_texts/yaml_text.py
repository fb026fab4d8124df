"""YAML as people write it: text of several lines as it is, and an image that is named once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml


class Image(str):
    """A container's image: written at its first place, behind an anchor; the others refer to it."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return not isinstance(data, Image)

    def generate_anchor(self, node: yaml.Node) -> str:
        return "image"


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(Image, _represent_text)


def yaml_text(documents: Sequence[Any]) -> str:
    """The documents, one after the other."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)
