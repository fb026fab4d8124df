"""What mkdocs is told besides mkdocs.yml: the pages that lie beside docs/ are pages of the site too, and links to files
of the source are their names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
BESIDE = {
    "README.md": "index.md", "README.zh-CN.md": "index.zh-CN.md", "CONTRIBUTING.md": "CONTRIBUTING.md",
    "LOG.md": "LOG.md", "CHANGELOG.md": "CHANGELOG.md",
}  # fmt: skip
LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages beside docs/."""
    for name, page in BESIDE.items():
        text = (ROOT / name).read_text("utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links lead to pages; of one to a file of the source its name stays."""

    def led(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2].removeprefix("../"), match[3] or ""
        if target in BESIDE:
            return f"[{text}]({BESIDE[target]}{anchor})"
        return match[0] if files.get_file_from_path(target) else text

    return LINK.sub(led, markdown)
